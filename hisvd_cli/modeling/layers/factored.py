"""Tensors that are known by their factors only, for the products of mixtures of experts.

A model's own code indexes, transposes and multiplies a stacked parameter. ``Factored`` acts like
such a parameter in this code: through ``__torch_function__`` each product is computed factor by
factor, so that U V is never formed. What it does not support raises an error.

Letters: E experts, m outputs, n inputs, r rank, S tokens sorted by expert.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

_ALIGNMENT = 16  # bytes; grouped products of torch require it of every row


class Factored:
    """Acts like a tensor ``[..., m, n]`` or, transposed, ``[..., n, m]`` of which only the factors
    V ``[..., r, n]`` and U ``[..., m, r]`` exist.

    Attributes:
        transposed: whether the rows are inputs.
    """

    transposed: bool

    def owner(self) -> Factored:
        """Return the layer that the factors belong to."""
        return self

    def label(self) -> str:
        """Return the name of the layer in its model."""
        raise NotImplementedError

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
    def mT(self) -> Factored:  # noqa: N802 (torch's own name for it)
        """The transpose of each matrix."""
        return ExpertView(*self.factors(), not self.transposed, self.owner())

    @property
    def T(self) -> Factored:  # noqa: N802 (torch's own name for it)
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

    def contiguous(self) -> Factored:
        """Return self; the products take factors of any strides."""
        return self

    def transpose(self, first: int, second: int) -> Factored:
        """Return the transpose of each matrix."""
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return _refuse(self, f"transpose({first}, {second})")

    def __getitem__(self, index: Any) -> Factored:
        """Select experts by a number, a slice, or a tensor of numbers of any shape."""
        if self.ndim < 3 or index is None or index is Ellipsis or isinstance(index, tuple):
            return _refuse(self, f"the index {index!r}")
        v, u = (factor[index] if factor.dim() > 2 else factor for factor in self.factors())
        return ExpertView(v, u, self.transposed, self.owner())

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
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a product; every other function of torch is refused."""
        name = str(getattr(func, "__name__", func)).partition(".")[0]
        if name not in _FUNCTIONS:
            _refuse(_first_of([*args, *(kwargs or {}).values()]), name)
        return _FUNCTIONS[name](func, *args, **(kwargs or {}))


class ExpertView(Factored):
    """What indexing or transposing a stack gives.

    Args:
        v: V, ``[..., r, n]``, or ``[r, n]`` if it is common.
        u: U, ``[..., m, r]``, or ``[m, r]`` if it is common.
        transposed: whether the view acts like ``[..., n, m]``.
        layer: the layer that the factors belong to.
    """

    def __init__(self, v: Tensor, u: Tensor, transposed: bool, layer: Factored) -> None:
        self.v = v
        self.u = u
        self.transposed = transposed
        # Not the name of the layer: torch.compile would compile again for every name.
        self.layer = layer

    def __getattr__(self, name: str) -> NoReturn:
        layer = self.__dict__.get("layer")  # not there yet in a copy that is being made
        raise AttributeError(refusal(layer.label() if layer else "This", f".{name}"))

    def owner(self) -> Factored:
        """Return the layer that the factors belong to."""
        return self.layer

    def label(self) -> str:
        """Return the name of the layer in its model."""
        return self.layer.label()

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return V and U."""
        return self.v, self.u

    def to(self, *args: Any, **kwargs: Any) -> ExpertView:
        """Convert both factors; arguments as for ``Tensor.to``."""
        v, u = (factor.to(*args, **kwargs) for factor in (self.v, self.u))
        return ExpertView(v, u, self.transposed, self.owner())

    def float(self) -> ExpertView:
        """Convert both factors to float32."""
        return self.to(torch.float32)


def refusal(layer: str, operation: str) -> str:
    """Return the message of an error."""
    return (
        f"{layer} is a low-rank stack of experts, which does not support {operation}. Load the "
        "model with experts_implementation 'eager', 'batched_mm' or 'grouped_mm', or call "
        "model.dequantize() first."
    )


def _refuse(stack: Factored, operation: str) -> NoReturn:
    raise NotImplementedError(refusal(stack.label(), operation))


def _first_of(values: Iterable[Any]) -> Factored:
    """Return the first factored argument, also of a list of tensors."""
    flat = (item for v in values for item in (v if isinstance(v, list | tuple) else [v]))
    return next(item for item in flat if isinstance(item, Factored))


def pair_of(matrix: Factored) -> tuple[Tensor, Tensor]:
    """Return the two factors whose product ``first @ second`` the matrix is."""
    v, u = matrix.factors()
    return (v.mT, u.mT) if matrix.transposed else (u, v)


def _linear(function: Callable[..., Any], x: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear``: x ``[..., n]`` and a matrix ``[m, n]``."""
    if isinstance(x, Factored) or isinstance(bias, Factored) or weight.ndim != 2:
        _refuse(_first_of([x, weight, bias]), f"{function.__name__} of these arguments")
    first, second = pair_of(weight)
    return F.linear(F.linear(x, second), first, bias)


def _matmul(function: Callable[..., Any], a: Any, b: Any, **options: Any) -> Any:
    """A product with one factored matrix or stack, on either side."""
    if options or (isinstance(a, Factored) and isinstance(b, Factored)):
        _refuse(_first_of([a, b]), f"{function.__name__} of these arguments")
    if isinstance(b, Factored):
        first, second = pair_of(b)
        return a @ first @ second
    first, second = pair_of(a)
    return first @ (second @ b)


def _grouped(
    function: Callable[..., Any],
    x: Any,
    stack: Any,
    offs: Tensor | None = None,
    bias: Any = None,
    out_dtype: Any = None,
    aligned: bool = True,
) -> Any:
    """A grouped product: x ``[S, n]``, of which each expert takes the rows up to its offset.

    Args:
        function: computes it for tensors.
        x: the rows, sorted by expert.
        stack: the factors.
        offs: row after the last one of each expert, ``[E]``.
        bias: not supported.
        out_dtype: not supported.
        aligned: whether ``function`` requires aligned rows.
    """
    unsupported = bias is not None or out_dtype is not None or offs is None
    if unsupported or isinstance(x, Factored) or stack.ndim != 3:
        _refuse(_first_of([x, stack]), f"{function.__name__} of these arguments")
    v, u = stack.factors()
    lacking = -v.shape[-2] % (_ALIGNMENT // v.element_size())
    if lacking and aligned:
        if v.device.type == "cpu" and not torch.compiler.is_compiling():
            function = _by_expert  # in place of a copy of all experts
        else:
            v, u = F.pad(v, (0, 0, 0, lacking)), F.pad(u, (0, lacking))
    for factor in pair_of(ExpertView(v, u, stack.transposed, stack)):
        x = x @ factor if factor.dim() == 2 else function(x, factor, offs=offs)
    return x


def _grouped_fallback(function: Callable[..., Any], x: Any, stack: Any, offs: Tensor) -> Any:
    """The grouped product of transformers, for what that of torch does not support."""
    return _grouped(function, x, stack, offs, aligned=False)


def _by_expert(x: Tensor, factor: Tensor, *, offs: Tensor) -> Tensor:
    """A grouped product of any alignment: x ``[S, k]`` and ``[E, k, j]``."""
    ends = offs.tolist()
    parts = x[: ends[-1]].split([b - a for a, b in pairwise([0, *ends])])
    y = torch.cat([part @ matrix for part, matrix in zip(parts, factor, strict=True)])
    return F.pad(y, (0, 0, 0, len(x) - len(y)))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("grouped_mm", "_grouped_mm"), _grouped),
    "grouped_mm_fallback": _grouped_fallback,
    "transpose": lambda _, stack, first, second: stack.transpose(first, second),
}
"""Name of a function of torch → its form for factors."""
