"""Converts calls in a pickle to inert records, and torch's rebuild calls to tensor descriptions."""

from __future__ import annotations

from collections.abc import Callable

from hisvd_cli.modeling.pickles.records import (
    ITEM_SIZES,
    Global,
    Node,
    RefusedError,
    Storage,
    Tensor,
    clean,
)

_MAX_DIMENSIONS = 64
MAX_COUNT = 1 << 62


def kind_of(value: object) -> str:
    """Return the type name of a value, for messages."""
    return value.kind if isinstance(value, Node) else type(value).__name__


def add_states(target: Node | Tensor, states: list[object]) -> None:
    """Append to the states of a record."""
    target.states = target.states or []
    target.states += states


def called(function: object, args: object) -> object:
    """Return the record of a call: a tensor description for rebuild functions, else a `Node`."""
    if not isinstance(args, tuple):
        raise RefusedError(f"the arguments of a call are a {kind_of(args)}, not a tuple")
    if not isinstance(function, Global):
        return Node("call of an object", (function, *args))
    rebuild = _REBUILDERS.get(function.path)
    if rebuild is not None:
        return rebuild(args)
    # These helpers take the class of the new instance as first argument.
    if function.path in _CONSTRUCTORS and args and isinstance(args[0], Global):
        return Node(args[0].path, args[1:])
    return Node(function.path, args)


def _counts(value: object, what: str) -> tuple[int, ...]:
    """Return a tensor's sizes or strides after checking them."""
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise RefusedError(f"a tensor's {what} is not a short tuple")
    counts = tuple(count for count in value if isinstance(count, int) and 0 <= count <= MAX_COUNT)
    if len(counts) != len(value):
        raise RefusedError(f"a tensor's {what} contains values that are not counts")
    return counts


def _described(
    storage: Storage, offset: object, size: object, stride: object, dtype: str
) -> Tensor:
    shape, strides = _counts(size, "shape"), _counts(stride, "strides")
    (start,) = _counts((offset,), "offset")
    if len(shape) != len(strides):
        raise RefusedError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    if dtype not in ITEM_SIZES:
        raise RefusedError(f"a tensor has the unknown dtype {clean(dtype)}")
    return Tensor(storage, start, shape, strides, dtype)


def _tensor(args: tuple[object, ...]) -> Tensor:
    match args:
        case (Storage() as storage, offset, size, stride, _, _, Global() as dtype, *_):
            return _described(storage, offset, size, stride, dtype.name)
        case (Storage() as storage, offset, size, stride, *_):
            return _described(storage, offset, size, stride, storage.dtype)
    raise RefusedError("a tensor's description is not one that torch writes")


def _parameter(args: tuple[object, ...]) -> object:
    match args:
        case (Tensor() as tensor, _, _, *states):
            add_states(tensor, states)
            return tensor
    return Node("torch.nn.parameter.Parameter", args)


def _tensor_with_attributes(args: tuple[object, ...]) -> object:
    match args:  # rebuild function of the tensor, its type, arguments of that function, attributes
        case (Global() as function, _, tuple() as inner, *states):
            if _REBUILDERS.get(function.path) is _tensor:
                tensor = _tensor(inner)
                add_states(tensor, states)
                return tensor
    return Node("torch._tensor._rebuild_from_type_v2", args)


def _size(args: tuple[object, ...]) -> object:
    return args[0] if len(args) == 1 and isinstance(args[0], tuple) else Node("torch.Size", args)


_REBUILDERS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": _size,
}
_CONSTRUCTORS = frozenset({"copyreg.__newobj__", "copyreg.__newobj_ex__", "copyreg._reconstructor"})
