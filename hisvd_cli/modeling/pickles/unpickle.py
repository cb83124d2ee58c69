"""A pickle reader that never executes code.

A pickle is a program for a stack machine, whose instructions can import and call anything that the
file names. `Machine` interprets the instructions without importing or calling: a global becomes a
`Global` (two strings), a call becomes a `Node` with function and arguments, and state is stored in
a list instead of being set as attributes. Keys of dicts in the file are not hashed.

The bytes are parsed by the standard library's `pickletools.genops`. The number of bytes, the number
of instructions and the length of text lines are limited.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import IO, Any, cast

from hisvd_cli.modeling.pickles.bounded_reader import BoundedReader
from hisvd_cli.modeling.pickles.calls import MAX_COUNT, add_states, called, kind_of
from hisvd_cli.modeling.pickles.records import (
    ITEM_SIZES,
    Global,
    Node,
    RefusedError,
    Storage,
    Tensor,
    clean,
)

MAX_OPERATIONS = 10_000_000  # a pickled mixture of experts with 37 000 layers needs 6 million
# Limit of instructions: a constant plus a share of the file size, as a byte can create 80 bytes.
_FREE_OPERATIONS = 200_000
_BYTES_PER_OPERATION = 4

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


class Machine:
    """Reads the pickles of one file into `Node`, `Tensor`, `Storage`, `Global` and plain values.

    Attributes:
        globals: all globals that the file names, by module and name.
        storages: all storages that it refers to, by key; the first description of a key is kept.
        altered: classes and functions whose attributes the file would set.
        operations: number of instructions interpreted.

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
        """Interpret one pickle up to its STOP, and return the resulting object."""
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
            raise RefusedError("the pickle pops from an empty stack")
        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack:
            raise RefusedError("the pickle reads from an empty stack")
        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise RefusedError("the pickle pops a mark that was never pushed")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _top_node(self) -> Node:
        node = self._top()
        if not isinstance(node, Node):
            raise RefusedError(f"the pickle adds items to a {kind_of(node)}")
        return node

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _discard(self, _: Any) -> None:
        # As in the standard unpickler: if the group is empty, POP removes the mark itself.
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
            raise RefusedError(f"the pickle refers to memo {index}, which was never stored")
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

    # Globals, calls and state: the instructions that execute code in other unpicklers.

    def _name(self, module: object, name: object) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedError(
                f"the pickle names a global by a {kind_of(module)} and a {kind_of(name)}"
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
        self._stack.append(called(function, args))

    def _new_object(self, _: Any) -> None:
        args, cls = self._pop(), self._pop()
        self._stack.append(called(cls, args))

    def _new_object_with_keywords(self, _: Any) -> None:
        keywords, args, cls = self._pop(), self._pop(), self._pop()
        if not isinstance(args, tuple):
            raise RefusedError(f"the arguments of a call are a {kind_of(args)}, not a tuple")
        self._stack.append(called(cls, (*args, keywords)))

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Node | Tensor):
            add_states(target, [state])
        elif isinstance(target, Global):
            self.altered[target.path] = target
        else:
            raise RefusedError(f"the pickle sets the state of a {kind_of(target)}")

    def _persistent(self, _: Any) -> None:
        match self._pop():
            case ("storage", Global() as cls, str(key), _, int(count), *view):
                self._stack.append(self._storage(cls, key, count, view))
            case ("module", Global() as cls, *_):  # the legacy format includes the class's source
                self._stack.append(cls)
            case _:
                raise RefusedError("the pickle refers to external data that is not tensor storage")

    def _storage(self, cls: Global, key: str, count: int, view: list[object]) -> Storage:
        dtype = _STORAGE_DTYPES.get(cls.name.rpartition(".")[2])
        if dtype is None or cls.module.partition(".")[0] != "torch":
            raise RefusedError(f"`{cls.path}` is not a known type of tensor storage")
        if not 0 <= count <= MAX_COUNT:
            raise RefusedError("a storage has an invalid number of elements")
        if view and view[0] is not None:
            raise RefusedError("storage views, from before torch 0.4, are not supported")
        storage = Storage(clean(key), dtype, count * ITEM_SIZES[dtype])
        return self.storages.setdefault(storage.key, storage)


# Opcodes that push their argument.
_VALUE_OPCODES = frozenset(
    {
        *("NONE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINSTRING", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)


def _push(make: Callable[[], object]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine._stack.append(make())


# Opcodes of protocols 2 to 5. Not listed, and therefore rejected: text opcodes of older protocols
# (including INST and OBJ), extension codes, text persistent ids, out-of-band buffers.
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
