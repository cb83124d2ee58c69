"""Low-rank stacks of experts: two factors in place of one stacked parameter.

Mixtures of experts hold the weights of E experts in one parameter, ``[E, m, n]`` (m outputs, n
inputs), or ``[E, n, m]`` if their code multiplies from the other side. ``LowRankExperts`` takes
the place and the name of such a parameter; ``factored`` makes it work in the model's own code.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch and another copied file.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .factored import Factored, pair_of, refusal

ExpertLayout = Literal["separate", "shared-v", "shared-u"]

EXPERT_LAYOUTS = ("separate", "shared-v", "shared-u")
"""Which factors belong to each expert: both, or only U (V is common), or only V (U is common)."""


class ExpertStack(NamedTuple):
    """A dense stack of experts in a model.

    Attributes:
        parameter: the weights, ``[E, m, n]`` or transposed ``[E, n, m]``.
        transposed: whether they are transposed.
    """

    parameter: nn.Parameter
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, m and n."""
        count, rows, columns = self.parameter.shape
        return (count, columns, rows) if self.transposed else (count, rows, columns)


def find_stack(model: nn.Module, name: str) -> ExpertStack | None:
    """Return the stack of a name, or None if that is not a parameter with three dimensions.

    The weight of a convolution is no stack either.
    """
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    parameter = owner._parameters.get(leaf)
    if parameter is None or parameter.dim() != 3 or isinstance(owner, nn.modules.conv._ConvNd):
        return None
    return ExpertStack(parameter, is_transposed(owner))


def is_transposed(experts: nn.Module) -> bool:
    """Return whether an experts module holds its weights as ``[E, n, m]``.

    transformers marks most of these modules. For the others the shapes tell: one of
    ``gate_up_proj`` and ``down_proj`` is twice as long in the dimension that they share.
    """
    marked = getattr(experts, "is_transposed", None)
    if marked is not None:
        return bool(marked)
    up, down = (_shape(experts, name) for name in ("gate_up_proj", "down_proj"))
    return len(up) == len(down) == 3 and up[2] == 2 * down[1] and up[1] == down[2]


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(getattr(getattr(module, name, None), "shape", ()))


def expert_shapes(
    layout: ExpertLayout, sizes: tuple[int, int, int], rank: int
) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the tensors that replace a stack.

    Args:
        layout: one of :data:`EXPERT_LAYOUTS`.
        sizes: E, m and n.
        rank: r, of every expert.
    """
    count, outputs, inputs = sizes
    v = (rank, inputs) if layout == "shared-v" else (count, rank, inputs)
    u = (outputs, rank) if layout == "shared-u" else (count, outputs, rank)
    return {"weight": v, "weight_u": u}


class LowRankExperts(Factored, nn.Module):
    """A stack of experts whose weights are products U V of one common rank.

    Attributes:
        weight: V, ``[E, r, n]``, or ``[r, n]`` if it is common to all experts.
        weight_u: U, ``[E, m, r]``, or ``[m, r]`` if it is common to all experts.

    Args:
        sizes: E, m and n.
        rank: r, at least 1.
        layout: one of :data:`EXPERT_LAYOUTS`.
        transposed: whether to act like a parameter ``[E, n, m]`` instead of ``[E, m, n]``.
        layer: name of the stack in its model, for messages.
        device: of the new tensors, as in ``nn.Linear``.
        dtype: of the new tensors, as in ``nn.Linear``.

    Raises:
        ValueError: the rank is below 1, or the layout is unknown.
    """

    bias: None = None  # biases stay parameters of the experts module
    _is_hf_initialized = True  # transformers would initialize it like the parameter it replaces

    def __init__(
        self,
        sizes: tuple[int, int, int],
        rank: int,
        layout: ExpertLayout = "separate",
        transposed: bool = False,
        layer: str = "experts",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"The rank of {layer} must be at least 1, not {rank}.")
        if layout not in EXPERT_LAYOUTS:
            raise ValueError(f"Unknown layout of experts: {layout!r}. Use one of {EXPERT_LAYOUTS}.")
        self.experts, self.out_features, self.in_features = sizes
        self.rank = rank
        self.layout: ExpertLayout = layout
        self.transposed = transposed
        self.layer = layer
        shapes = self.stored_shapes()
        self.weight = nn.Parameter(torch.empty(shapes["weight"], device=device, dtype=dtype))
        self.weight_u = nn.Parameter(torch.empty(shapes["weight_u"], device=device, dtype=dtype))
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            raise AttributeError(refusal(self.layer, f".{name}")) from None

    def label(self) -> str:
        """Return the name of the layer in its model."""
        return self.layer

    def reset_parameters(self) -> None:
        """Initialize both factors at random, with the bounds of ``nn.Linear``."""
        for factor in (self.weight, self.weight_u):
            bound = 1 / math.sqrt(factor.shape[-1])
            nn.init.uniform_(factor, -bound, bound)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return V and U; those of an offloaded layer are on the meta device."""
        return self.weight, self.weight_u

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return V and U for computing.

        accelerate loads offloaded tensors when a module is called. This one is never called, so
        its hook is run here.
        """
        hook = self.__dict__.get("_hf_hook")
        if hook is None or not self.weight.is_meta:
            return self.stored()
        hook.pre_forward(self)
        loaded = self.stored()
        hook.post_forward(self, None)
        return loaded

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name → shape of the layer's tensors."""
        sizes = (self.experts, self.out_features, self.in_features)
        return expert_shapes(self.layout, sizes, self.rank)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense parameter, ``[E, m, n]`` or ``[E, n, m]``.

        Each product is computed in float32 or wider, and rounded once.

        Args:
            dtype: dtype of the result; by default that of the layer.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        dense = torch.empty(self.shape, device=self.device, dtype=dtype or self.dtype)
        for i in range(self.experts):
            first, second = pair_of(self[i])
            dense[i] = first.to(wide) @ second.to(wide)
        return dense

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, with the rank and the experts added."""
        return (
            f"experts={self.experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, rank={self.rank}, layout={self.layout}"
        )
