"""A pickle reader that cannot run anything.

A pickle is a program for a small stack machine, and two of its instructions import and call
whatever the file names. `Machine` interprets the instructions by itself and knows neither: a
global becomes a `Global`, two strings; a call becomes a `Node` that notes who was called with
what; state is stored in a list and never set as an attribute. Keys of the file's dicts are not
hashed either. A crafted file finds nothing to take hold of.

Only the standard library's opcode parser (`pickletools.genops`) touches the bytes. Their number,
the number of instructions and the length of a text line are bounded.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

MAX_PICKLE_BYTES = 1 << 30
MAX_OPERATIONS = 10_000_000  # a pickled mixture of 37 000 linears takes about 6 million
# What a small file may take, and how that grows with its size: one byte of a pickle can become an
# object of 80, and one of an archive a thousand bytes of a pickle.
_FREE_BYTES = 1 << 24
_FREE_OPERATIONS = 200_000
_BYTES_PER_OPERATION = 4
MAX_LINE_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 300
_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 62

_ITEM_SIZES = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("float8_e8m0fnu", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}

_RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them


class RefusedError(ValueError):
    """A pickle that is damaged, over a bound, or holds what `torch.save` never writes."""


def clean(text: str) -> str:
    """Return text from a file as something that a terminal can show: short, no control codes."""
    short = text if len(text) <= MAX_NAME_CHARACTERS else text[: MAX_NAME_CHARACTERS - 1] + "…"
    return short if short.isprintable() else short.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """What the file names as a class or function: two strings, never the thing itself."""

    module: str
    name: str
    path: str

    @classmethod
    def named(cls, module: str, name: str) -> Global:
        """Build one with its name for display."""
        module = _RENAMED_MODULES.get(module, module)
        return cls(module, name, clean(f"{module}.{name}"))


@dataclass(slots=True, eq=False)
class Node:
    """An inert object: a container, an instance, or the result of a call that was not made."""

    kind: str
    args: tuple[object, ...] = ()
    items: list[object] | None = None  # None until needed: a crafted file holds millions of nodes
    entries: list[tuple[object, object]] | None = None
    states: list[object] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The description of a block of tensor data; the data is not read."""

    key: str
    dtype: str
    nbytes: int


@dataclass(slots=True, eq=False)
class Tensor:
    """The description of a tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    states: list[object] | None = None

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return _ITEM_SIZES[self.dtype]


def check_inflated(size: int, file_bytes: int) -> None:
    """Raise RefusedError where a compressed pickle unpacks to more than its file accounts for."""
    if size > _FREE_BYTES + file_bytes:
        raise RefusedError(f"its pickle unpacks to {size:,} bytes, from a file of {file_bytes:,}")


class BoundedReader:
    """The part of a binary file that `genops` needs, with a limit on what it reads."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._limit = min(limit, MAX_PICKLE_BYTES)
        self._position = 0

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        if count > self._limit - self._position:
            raise RefusedError(f"the pickle does not end within its {self._limit:,} bytes")
        return self._advance(self._stream.read(count))

    def readline(self) -> bytes:
        """Read one line of a text opcode."""
        line = self._stream.readline(MAX_LINE_BYTES + 1)
        if len(line) > min(MAX_LINE_BYTES, self._limit - self._position):
            raise RefusedError("a text line of the pickle is too long")
        if b"\\" in line:  # genops would unescape it, which a loader does not
            raise RefusedError("a global's name holds a backslash")
        return self._advance(line)

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def _advance(self, data: bytes) -> bytes:
        self._position += len(data)
        return data


class Machine:
    """Reads the pickles of one file into `Node`, `Tensor`, `Storage`, `Global` and plain values.

    Attributes:
        globals: every global that the file names, by module and name.
        storages: every storage that it refers to, by key; the first description of a key holds.
        altered: the classes and functions whose own attributes the file would set.
        operations: how many instructions were interpreted.

    Args:
        file_bytes: size of the file on disk, which bounds the number of instructions.
    """

    def __init__(self, file_bytes: int) -> None:
        self.globals: dict[tuple[str, str], Global] = {}
        self.storages: dict[str, Storage] = {}
        self.altered: dict[str, Global] = {}
        self.operations = 0
        self._allowed = min(MAX_OPERATIONS, _FREE_OPERATIONS + file_bytes // _BYTES_PER_OPERATION)
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def load(self, reader: BoundedReader) -> object:
        """Interpret one pickle, up to and including its STOP, and return what it builds."""
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, argument, position in pickletools.genops(cast(IO[bytes], reader)):
            self.operations += 1
            if self.operations > self._allowed:
                raise RefusedError(
                    f"the pickle has more than {self._allowed:,} instructions, which is too many "
                    "for a file of its size"
                )
            if opcode.name in _VALUE_OPCODES:
                self._stack.append(argument)
                continue
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise RefusedError(f"instruction {opcode.name} at byte {position} is not allowed")
            handler(self, argument)
        return self._pop()

    # The stack.

    def _pop(self) -> object:
        if not self._stack:
            raise RefusedError("the pickle takes a value from an empty stack")
        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack:
            raise RefusedError("the pickle looks at an empty stack")
        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise RefusedError("the pickle closes a group that it never opened")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _top_node(self) -> Node:
        node = self._top()
        if not isinstance(node, Node):
            raise RefusedError(f"the pickle adds items to a {_kind(node)}")
        return node

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _discard(self, _: Any) -> None:
        # As in the stock machine: on an empty group, POP removes the mark itself.
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    # The memo.

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise RefusedError(f"the pickle refers to value {index}, which it never stored")
        self._stack.append(self._memo[index])

    # Containers.

    def _tuple(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _short_tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _frozen_set(self, _: Any) -> None:
        items = self._pop_mark()
        self._stack.append(Node("frozenset", items=items))

    def _append(self, _: Any) -> None:
        self._add_items([self._pop()])

    def _append_all(self, _: Any) -> None:
        self._add_items(self._pop_mark())

    def _add_items(self, items: list[object]) -> None:
        node = self._top_node()
        node.items = node.items or []
        node.items += items

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._add_entries([key, value])

    def _set_items(self, _: Any) -> None:
        self._add_entries(self._pop_mark())

    def _add_entries(self, items: list[object]) -> None:
        if len(items) % 2:
            raise RefusedError("the pickle has a key without a value")
        node = self._top_node()
        node.entries = node.entries or []
        node.entries += zip(items[::2], items[1::2], strict=True)

    # Globals, calls and state: the instructions that run code elsewhere.

    def _name(self, module: object, name: object) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedError(
                f"the pickle names a global by a {_kind(module)} and a {_kind(name)}"
            )
        return self.globals.setdefault((module, name), Global.named(module, name))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self._name(module, name))

    def _reduce(self, _: Any) -> None:
        args, function = self._pop(), self._pop()
        self._stack.append(_call(function, args))

    def _new_object(self, _: Any) -> None:
        args, cls = self._pop(), self._pop()
        self._stack.append(_call(cls, args))

    def _new_object_with_keywords(self, _: Any) -> None:
        keywords, args, cls = self._pop(), self._pop(), self._pop()
        if not isinstance(args, tuple):
            raise RefusedError(f"the pickle calls with a {_kind(args)} of arguments")
        self._stack.append(_call(cls, (*args, keywords)))

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Node | Tensor):
            _add_states(target, [state])
        elif isinstance(target, Global):
            self.altered[target.path] = target
        else:
            raise RefusedError(f"the pickle sets the state of a {_kind(target)}")

    def _persistent(self, _: Any) -> None:
        match self._pop():
            case ("storage", Global() as cls, str(key), _, int(count), *view):
                self._stack.append(self._storage(cls, key, count, view))
            case ("module", Global() as cls, *_):  # the legacy format adds the class's source
                self._stack.append(cls)
            case _:
                raise RefusedError("the pickle refers to outside data that is no tensor storage")

    def _storage(self, cls: Global, key: str, count: int, view: list[object]) -> Storage:
        dtype = _STORAGE_DTYPES.get(cls.name.rpartition(".")[2])
        if dtype is None or cls.module.partition(".")[0] != "torch":
            raise RefusedError(f"`{cls.path}` is no known type of tensor storage")
        if not 0 <= count <= _MAX_COUNT:
            raise RefusedError("a storage has an impossible number of elements")
        if view and view[0] is not None:
            raise RefusedError("storage views, a format from before torch 0.4, are not read")
        storage = Storage(clean(key), dtype, count * _ITEM_SIZES[dtype])
        return self.storages.setdefault(storage.key, storage)


def _kind(value: object) -> str:
    return value.kind if isinstance(value, Node) else type(value).__name__


def _add_states(target: Node | Tensor, states: list[object]) -> None:
    target.states = target.states or []
    target.states += states


def _call(function: object, args: object) -> object:
    """Return the record of a call: a tensor's description where it is one, else a `Node`."""
    if not isinstance(args, tuple):
        raise RefusedError(f"the pickle calls with a {_kind(args)} of arguments")
    if not isinstance(function, Global):
        return Node("call of an object", (function, *args))
    rebuild = _REBUILDERS.get(function.path)
    if rebuild is not None:
        return rebuild(args)
    # The helpers that make an instance take its class as their first argument.
    if function.path in _CONSTRUCTORS and args and isinstance(args[0], Global):
        return Node(args[0].path, args[1:])
    return Node(function.path, args)


def _counts(value: object, what: str) -> tuple[int, ...]:
    """Return a tensor's sizes or strides, checked."""
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise RefusedError(f"a tensor's {what} is not a short tuple")
    counts = tuple(count for count in value if isinstance(count, int) and 0 <= count <= _MAX_COUNT)
    if len(counts) != len(value):
        raise RefusedError(f"a tensor's {what} holds something else than counts")
    return counts


def _described(
    storage: Storage, offset: object, size: object, stride: object, dtype: str
) -> Tensor:
    shape, strides = _counts(size, "shape"), _counts(stride, "strides")
    (start,) = _counts((offset,), "offset")
    if len(shape) != len(strides):
        raise RefusedError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    if dtype not in _ITEM_SIZES:
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
            _add_states(tensor, states)
            return tensor
    return Node("torch.nn.parameter.Parameter", args)


def _tensor_with_attributes(args: tuple[object, ...]) -> object:
    match args:  # the tensor's rebuild function, its type, that function's arguments, attributes
        case (Global() as function, _, tuple() as inner, *states):
            if _REBUILDERS.get(function.path) is _tensor:
                tensor = _tensor(inner)
                _add_states(tensor, states)
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

# Their argument is the value.
_VALUE_OPCODES = frozenset(
    {
        *("NONE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINSTRING", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)


def _push(make: Callable[[], object]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine._stack.append(make())


# What pickle writes under protocols 2 to 5. Not here, so refused: the text instructions of older
# protocols (INST and OBJ among them), extension codes, text persistent ids, out-of-band buffers.
_HANDLERS: dict[str, Callable[[Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda *_: None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Machine._get),
    "MEMOIZE": Machine._memoize,
    "MARK": Machine._mark,
    "POP": Machine._discard,
    "POP_MARK": lambda machine, _: machine._pop_mark(),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(lambda: Node("list")),
    "EMPTY_DICT": _push(lambda: Node("dict")),
    "EMPTY_SET": _push(lambda: Node("set")),
    "EMPTY_TUPLE": _push(tuple),
    "TUPLE1": lambda machine, _: machine._short_tuple(1),
    "TUPLE2": lambda machine, _: machine._short_tuple(2),
    "TUPLE3": lambda machine, _: machine._short_tuple(3),
    "TUPLE": Machine._tuple,
    "FROZENSET": Machine._frozen_set,
    "APPEND": Machine._append,
    "APPENDS": Machine._append_all,
    "ADDITEMS": Machine._append_all,
    "SETITEM": Machine._set_item,
    "SETITEMS": Machine._set_items,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._new_object,
    "NEWOBJ_EX": Machine._new_object_with_keywords,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}
