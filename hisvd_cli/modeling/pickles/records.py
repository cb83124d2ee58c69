"""Inert records of the classes, calls and tensors in a pickle."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NAME_CHARACTERS = 300
ITEM_SIZES = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("float8_e8m0fnu", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
_RENAMED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them


class RefusedError(ValueError):
    """A pickle is damaged, exceeds a limit, or contains what `torch.save` never writes."""


def clean(text: str) -> str:
    """Return text from a file shortened and without control characters, for display."""
    short = text if len(text) <= MAX_NAME_CHARACTERS else text[: MAX_NAME_CHARACTERS - 1] + "…"
    return short if short.isprintable() else short.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or function that the file names; it is never imported."""

    module: str
    name: str
    path: str

    @classmethod
    def named(cls, module: str, name: str) -> Global:
        """Return a global with its name for display."""
        module = _RENAMED_MODULES.get(module, module)
        return cls(module, name, clean(f"{module}.{name}"))


@dataclass(slots=True, eq=False)
class Node:
    """A container, an instance, or the result of a call, which is not executed."""

    kind: str
    args: tuple[object, ...] = ()
    items: list[object] | None = None  # None until needed: malicious files have millions of nodes
    entries: list[tuple[object, object]] | None = None
    states: list[object] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Description of a tensor storage; its data is not read."""

    key: str
    dtype: str
    nbytes: int


@dataclass(slots=True, eq=False)
class Tensor:
    """Description of a tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    states: list[object] | None = None

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return ITEM_SIZES[self.dtype]
