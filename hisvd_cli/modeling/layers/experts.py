"""Low-rank stacks of experts: two factors in place of one stacked parameter.

Mixtures of experts hold the weights of E experts in one parameter, ``[E, m, n]`` (m outputs, n
inputs), or ``[E, n, m]`` if their code multiplies from the other side. ``LowRankExperts`` takes
the place and the name of such a parameter. The model's own code indexes, transposes and multiplies
it as before; ``__torch_function__`` computes each product factor by factor, so that U V is never
formed. What it does not support raises an error.

Letters: E experts, m outputs, n inputs, r rank, S tokens sorted by expert.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

ExpertLayout = Literal["separate", "shared-v", "shared-u"]

EXPERT_LAYOUTS = ("separate", "shared-v", "shared-u")
"""Which factors belong to each expert: both, or only U (V is common), or only V (U is common)."""

_ALIGNMENT = 16  # bytes; grouped products of torch require it of every row


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
    """Return the stack of a name, or None if that is not a parameter with three dimensions."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    parameter = owner._parameters.get(leaf)
    if parameter is None or parameter.dim() != 3:
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
    shapes = [getattr(getattr(experts, x, None), "shape", ()) for x in ("gate_up_proj", "down_proj")]
    if len(shapes[0]) != 3 or len(shapes[1]) != 3:
        return False
    (_, rows, columns), (_, inner, outer) = shapes
    return bool(columns == 2 * inner and rows == outer)


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


class _Factored:
    """Acts like a tensor ``[..., m, n]`` or, transposed, ``[..., n, m]`` of which only the factors
    V ``[..., r, n]`` and U ``[..., m, r]`` exist.

    Attributes:
        stack: the layer that the factors belong to.
        transposed: whether the rows are inputs.
    """

    stack: LowRankExperts
    transposed: bool

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return V and U; those of an offloaded layer are on the meta device."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return V and U for computing."""
        return self.stored()

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor."""
        v, u = self.stored()
        batch = max(v.shape[:-2], u.shape[:-2], key=len)
        sizes = (v.shape[-1], u.shape[-2]) if self.transposed else (u.shape[-2], v.shape[-1])
        return torch.Size((*batch, *sizes))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self.stored()[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.stored()[0].device

    @property
    def mT(self) -> _Factored:  # noqa: N802 (torch's own name for it)
        """The transpose of each matrix."""
        return ExpertView(*self.factors(), not self.transposed, self.stack)

    @property
    def T(self) -> _Factored:  # noqa: N802 (torch's own name for it)
        """The transpose of one matrix."""
        return self.mT if self.ndim == 2 else _refuse(self, ".T of a stack")

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one number of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def data_ptr(self) -> int:
        """Return a number that is as aligned as the less aligned factor; not an address."""
        v, u = self.stored()
        return v.data_ptr() | u.data_ptr()

    def contiguous(self) -> _Factored:
        """Return self; the products take factors of any strides."""
        return self

    def transpose(self, first: int, second: int) -> _Factored:
        """Return the transpose of each matrix."""
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return _refuse(self, f"transpose({first}, {second})")

    def __getitem__(self, index: Any) -> _Factored:
        """Select experts by a number, a slice, or a tensor of numbers of any shape."""
        if self.ndim < 3 or index is None or index is Ellipsis or isinstance(index, tuple):
            return _refuse(self, f"the index {index!r}")
        v, u = (factor[index] if factor.dim() > 2 else factor for factor in self.factors())
        return ExpertView(v, u, self.transposed, self.stack)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(cast(Tensor, self), other)

    def _no_arithmetic(self, other: object) -> NoReturn:  # noqa: ARG002 (an operator's signature)
        _refuse(self, "arithmetic other than products")

    __add__ = __radd__ = __sub__ = __rsub__ = _no_arithmetic
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_arithmetic

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],  # noqa: ARG003 (part of torch's protocol)
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a product; every other function of torch is refused."""
        name = str(getattr(func, "__name__", func)).partition(".")[0]
        if name not in _FUNCTIONS:
            _refuse(_first_of([*args, *(kwargs or {}).values()]), name)
        return _FUNCTIONS[name](func, *args, **(kwargs or {}))


class ExpertView(_Factored):
    """What indexing or transposing a stack gives.

    Args:
        v: V, ``[..., r, n]``, or ``[r, n]`` if it is common.
        u: U, ``[..., m, r]``, or ``[m, r]`` if it is common.
        transposed: whether the view acts like ``[..., n, m]``.
        stack: the layer that the factors belong to.
    """

    def __init__(self, v: Tensor, u: Tensor, transposed: bool, stack: LowRankExperts) -> None:
        self.v = v
        self.u = u
        self.transposed = transposed
        # Not the name of the layer: torch.compile would compile again for every name.
        self.stack = stack

    def __getattr__(self, name: str) -> NoReturn:
        layer = self.__dict__["stack"].layer if "stack" in self.__dict__ else "This"
        raise AttributeError(_refusal(layer, f".{name}"))

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return V and U."""
        return self.v, self.u

    def to(self, *args: Any, **kwargs: Any) -> ExpertView:
        """Convert both factors; arguments as for ``Tensor.to``."""
        v, u = (factor.to(*args, **kwargs) for factor in (self.v, self.u))
        return ExpertView(v, u, self.transposed, self.stack)

    def float(self) -> ExpertView:
        """Convert both factors to float32."""
        return self.to(torch.float32)


class LowRankExperts(_Factored, nn.Module):
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
            raise AttributeError(_refusal(self.layer, f".{name}")) from None

    @property
    def stack(self) -> LowRankExperts:  # type: ignore[override]
        """The layer itself."""
        return self

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
            first, second = _pair(self[i])
            dense[i] = first.to(wide) @ second.to(wide)
        return dense

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, with the rank and the experts added."""
        return (
            f"experts={self.experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, rank={self.rank}, layout={self.layout}"
        )


def _refusal(layer: str, operation: str) -> str:
    return (
        f"{layer} is a low-rank stack of experts, which does not support {operation}. Load the "
        "model with experts_implementation 'eager', 'batched_mm' or 'grouped_mm', or call "
        "model.dequantize() first."
    )


def _refuse(stack: _Factored, operation: str) -> NoReturn:
    raise NotImplementedError(_refusal(stack.stack.layer, operation))


def _first_of(values: Iterable[Any]) -> _Factored:
    """Return the first factored argument, also of a list of tensors."""
    flat = (item for v in values for item in (v if isinstance(v, list | tuple) else [v]))
    return next(item for item in flat if isinstance(item, _Factored))


def _pair(matrix: _Factored) -> tuple[Tensor, Tensor]:
    """Return the two factors whose product ``first @ second`` the matrix is."""
    v, u = matrix.factors()
    return (v.mT, u.mT) if matrix.transposed else (u, v)


def _linear(function: Callable[..., Any], x: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear``: x ``[..., n]`` and a matrix ``[m, n]``."""
    if isinstance(x, _Factored) or isinstance(bias, _Factored) or weight.ndim != 2:
        _refuse(_first_of([x, weight, bias]), f"{function.__name__} of these arguments")
    first, second = _pair(weight)
    return F.linear(F.linear(x, second), first, bias)


def _matmul(function: Callable[..., Any], a: Any, b: Any, **options: Any) -> Any:
    """A product with one factored matrix or stack, on either side."""
    if options or (isinstance(a, _Factored) and isinstance(b, _Factored)):
        _refuse(_first_of([a, b]), f"{function.__name__} of these arguments")
    if isinstance(b, _Factored):
        first, second = _pair(b)
        return a @ first @ second
    first, second = _pair(a)
    return first @ (second @ b)


def _grouped(
    function: Callable[..., Any],
    x: Any,
    stack: Any,
    offs: Tensor | None = None,
    **options: Any,
) -> Any:
    """A grouped product: x ``[S, n]``, of which each expert takes the rows up to its offset."""
    given = [value for value in options.values() if value is not None]
    if given or isinstance(x, _Factored) or stack.ndim != 3:
        _refuse(_first_of([x, stack]), f"{function.__name__} of these arguments")
    v, u = stack.factors()
    lacking = -v.shape[-2] % (_ALIGNMENT // v.element_size())
    if lacking:  # the rows of U and of x V' must be aligned
        v, u = F.pad(v, (0, 0, 0, lacking)), F.pad(u, (0, lacking))
    y = x
    for factor in _pair(ExpertView(v, u, stack.transposed, stack.stack)):
        y = y @ factor if factor.dim() == 2 else function(y, factor, offs=offs)
    return y


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    "transpose": lambda _, stack, first, second: stack.transpose(first, second),
}
"""Name of a function of torch → its form for factors."""
