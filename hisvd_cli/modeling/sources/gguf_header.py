"""Checks that a ``.gguf`` file is as large as its header declares, before a library reads it.

The package gguf trusts all counts: one that exceeds the file makes it build endless lists. The
layout follows the GGUF specification, versions 2 and 3: a header, typed metadata, tensor
descriptions and tensor data.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NESTING = 8
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type → bytes, for types of fixed size."""
_STRING, _ARRAY = 8, 9
_LEAST = {**_WIDTHS, _STRING: 8, _ARRAY: 12}
_ALIGNMENT = "general.alignment"


def check_gguf(path: Path, sizes: dict[int, tuple[int, int]]) -> None:
    """Check all declared counts and sizes of a file.

    Args:
        path: the file.
        sizes: tensor type → (values per block, bytes per block).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a GGUF file, or smaller than declared.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Reader(data, sizes).check()


class _Reader:
    """Parses a file from its start; ``_offset`` is the current position.

    Args:
        data: the file.
        sizes: as in :func:`check_gguf`.
    """

    def __init__(self, data: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> None:
        self._data = data
        self._sizes = sizes
        self._offset = 0
        self._order = "<"
        self._alignment = 32

    def check(self) -> None:
        """Parse up to the end of the tensor descriptions. Raises ValueError."""
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I", 4)
        if version & 0xFFFF == 0:  # big-endian
            self._order, version = ">", struct.unpack("<I", struct.pack(">I", version))[0]
        if version not in _VERSIONS:
            raise ValueError(f"it has the unsupported version {version}")
        tensors, fields = self._number("Q", 8), self._number("Q", 8)
        self._expect(fields, 13, "fields")
        for _ in range(fields):
            name = self._string()
            kind = self._number("I", 4)
            if name == _ALIGNMENT and kind == 4:
                self._alignment = struct.unpack_from(self._order + "I", self._data, self._offset)[0]
            self._skip_value(kind, 0)
        self._expect(tensors, 24, "tensors")
        ends = [self._tensor_end() for _ in range(tensors)]
        if self._alignment < 1 or self._alignment & (self._alignment - 1):
            raise ValueError(f"its alignment is {self._alignment}, which is not a power of two")
        start = -(-self._offset // self._alignment) * self._alignment
        if ends and start + max(ends) > len(self._data):
            raise ValueError(f"it is smaller than the {start + max(ends):,} bytes of its tensors")

    def _take(self, count: int) -> bytes:
        self._expect(count, 1, "bytes")
        self._offset += count
        return self._data[self._offset - count : self._offset]

    def _number(self, code: str, width: int) -> int:
        value: int = struct.unpack(self._order + code, self._take(width))[0]
        return value

    def _string(self) -> str:
        return self._take(self._number("Q", 8)).decode("utf-8")

    def _expect(self, count: int, width: int, what: str) -> None:
        """Raise ValueError if fewer than ``count`` items of at least ``width`` bytes remain."""
        if count * width > len(self._data) - self._offset:
            raise ValueError(f"it declares {count:,} {what} but ends before them")

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            self._take(_WIDTHS[kind])
        elif kind == _STRING:
            self._take(self._number("Q", 8))
        elif kind == _ARRAY and depth < _MAX_NESTING:
            self._skip_array(depth)
        else:
            raise ValueError(f"it contains a value of the unknown type {kind}")

    def _skip_array(self, depth: int) -> None:
        kind, count = self._number("I", 4), self._number("Q", 8)
        if kind not in _LEAST:
            raise ValueError(f"it contains an array of the unknown type {kind}")
        self._expect(count, _LEAST[kind], "values")
        if kind in _WIDTHS:
            self._offset += count * _WIDTHS[kind]
            return
        for _ in range(count):
            self._skip_value(kind, depth + 1)

    def _tensor_end(self) -> int:
        """Return the end offset of the next tensor, relative to the tensor data."""
        name, dimensions = self._string(), self._number("I", 4)
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions")
        shape = [self._number("Q", 8) for _ in range(dimensions)]
        kind, offset = self._number("I", 4), self._number("Q", 8)
        if kind not in self._sizes:
            raise ValueError(f"its tensor {name} has the unknown type {kind}")
        block, width = self._sizes[kind]
        return offset + prod(shape) * width // block
