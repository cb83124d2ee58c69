"""Stacked experts of a mixture as one linear layer per expert, for hooks and decomposition.

transformers keeps the experts of a layer in one parameter ``[E, m, n]`` (or ``[E, n, m]``) and
multiplies by a slice of it. :class:`ExpertLinears` takes its place: slices are operands that run
the linear layer of their expert, so that the model's own forward method works unchanged and hooks
see the tokens of each expert.

Legend: E experts; m outputs and n inputs of each; T tokens, each routed to k experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from hisvd_cli.modeling.layers.experts import is_transposed


@dataclass(frozen=True)
class Routed:
    """The rows of an expert's input.

    Attributes:
        tokens: index of the token of each row, among all tokens of the batch.
        weights: router probability by which the expert's output for that row is multiplied.
        of: number of tokens in the batch.
    """

    tokens: Tensor
    weights: Tensor
    of: int


class ExpertLinears(nn.ModuleList):
    """One ``nn.Linear`` per expert in place of a stacked parameter.

    Args:
        parameter: the parameter ``[E, m, n]``, or ``[E, n, m]`` if ``transposed``.
        transposed: whether the model multiplies ``x @ parameter[i]``.
    """

    def __init__(self, parameter: Tensor, transposed: bool) -> None:
        count, first, second = parameter.shape
        m, n = (second, first) if transposed else (first, second)
        device, dtype = parameter.device, parameter.dtype
        super().__init__(nn.Linear(n, m, False, device, dtype) for _ in range(count))
        self.transposed = transposed
        self.routing: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        m, n = self.linear(0).weight.shape
        return torch.Size((len(self), n, m) if self.transposed else (len(self), m, n))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameter."""
        return self.linear(0).weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameter."""
        return self.linear(0).weight.device

    def linear(self, index: int) -> nn.Linear:
        """Return the linear layer of an expert."""
        layer = self._modules[str(index)]
        assert isinstance(layer, nn.Linear)
        return layer

    def __getitem__(self, index: Any) -> Any:
        """Return the operand that stands for the matrix of an expert."""
        return ExpertOperand(self, int(index))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(layer for layer in self._modules.values() if layer is not None)

    def run(self, index: int, x: Tensor) -> Tensor:
        """Run an expert's linear layer on its rows ``[R, n]``."""
        layer = self.linear(index)
        layer.routed = self._rows(index, len(x))  # type: ignore[assignment]  # for hooks
        try:
            result: Tensor = layer(x)
        finally:
            del layer.routed
        return result

    def _rows(self, index: int, count: int) -> Routed | None:
        if self.routing is None:
            return None
        choice, weights = self.routing
        place, tokens = torch.where((choice == index).T)
        if len(tokens) != count:
            return None
        return Routed(tokens, weights[tokens, place], len(choice))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply a batch per expert, ``[E, T, n]``, by the stack."""
        if func is torch.bmm and not kwargs and isinstance(args[1], cls) and args[1].transposed:
            x, stack = args
            return torch.stack([stack.run(i, x[i]) for i in range(len(stack))])
        raise _unsupported(func)


class ExpertOperand:
    """The matrix of one expert as an operand of a product."""

    def __init__(self, stack: ExpertLinears, index: int, turned: bool = False) -> None:
        self._stack = stack
        self._index = index
        self._turned = turned

    @property
    def _transposed(self) -> bool:
        return self._stack.transposed != self._turned

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix."""
        return self._stack.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        shape = self._stack.shape[1:]
        return torch.Size(reversed(shape)) if self._turned else shape

    @property
    def T(self) -> ExpertOperand:  # noqa: N802 (as in torch)
        """The transposed matrix."""
        return ExpertOperand(self._stack, self._index, not self._turned)

    def t(self) -> ExpertOperand:
        """Return the transposed matrix."""
        return self.T

    def transpose(self, _dim0: int, _dim1: int) -> ExpertOperand:
        """Return the transposed matrix."""
        return self.T

    def to(self, *_args: Any, **_kwargs: Any) -> ExpertOperand:
        """Return the operand itself: blocks run in one dtype on one device."""
        return self

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if not self._transposed:
            raise _unsupported(torch.matmul)
        return self._stack.run(self._index, x)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the expert's linear layer for ``F.linear`` and ``x @ matrix``."""
        given = dict(kwargs or {})
        if func is F.linear:
            x, operand, bias = (*args, *given.values(), None)[:3]
            if isinstance(operand, cls) and not operand._transposed:
                y = operand._stack.run(operand._index, x)
                return y if bias is None else y + bias
        elif func in _PRODUCTS and not given and isinstance(args[1], cls):
            return args[1]._product(args[0])
        raise _unsupported(func)


_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


def _unsupported(func: Callable[..., Any]) -> NotImplementedError:
    name = getattr(func, "__name__", str(func))
    return NotImplementedError(f"experts are used in torch.{name}, which hisvd does not support")


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return local name → stacked parameter ``[E, m, n]`` of a module of experts."""
    count = next((c for c in (getattr(module, name, None) for name in _COUNTS) if c), None)
    if not isinstance(count, int):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and len(parameter) == count and min(parameter.shape[1:]) > 1
    }


_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Attributes of modules that hold the number of experts."""


def separate_experts(blocks: nn.Module) -> None:
    """Replace each stacked parameter in ``blocks`` by one linear layer per expert."""
    for module in list(blocks.modules()):
        found = stacks_of(module)
        if not found:
            continue
        transposed = is_transposed(module)
        for name, parameter in found.items():
            delattr(module, name)
            setattr(module, name, ExpertLinears(parameter, transposed))
        module.register_forward_pre_hook(_note_routing, with_kwargs=True)


def _note_routing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pass the router's choice ``[T, k]`` and probabilities ``[T, k]`` on to the stacks."""
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    choices = [each for each in given if each.ndim == 2 and not each.is_floating_point()]
    routing = None
    if len(choices) == 1:
        same = [g for g in given if g.is_floating_point() and g.shape == choices[0].shape]
        routing = (choices[0], same[-1].detach()) if same else None
    for child in module.children():
        if isinstance(child, ExpertLinears):
            child.routing = routing
