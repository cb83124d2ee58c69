"""Look through a ``.gguf`` file before a library reads it: does it hold what it declares?

The package gguf believes every count: one that the file is too short for makes it build lists
without end. The layout is that of the GGUF specification, versions 2 and 3: a header, typed
metadata, descriptions of tensors, and their bytes.
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
"""Type of a value → its bytes; a string and an array have none."""
_STRING, _ARRAY = 8, 9
_LEAST = {**_WIDTHS, _STRING: 8, _ARRAY: 12}
_ALIGNMENT = "general.alignment"


def check_gguf(path: Path, sizes: dict[int, tuple[int, int]]) -> None:
    """Compare everything that a file declares with its size.

    Args:
        path: the file.
        sizes: type of a tensor → (numbers of a block, bytes of it).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no GGUF file, or shorter than what it declares.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Reader(data, sizes).check()


class _Reader:
    """Walks over a file; ``_offset`` is what comes next.

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
        """Walk to the end of the declarations. Raises ValueError."""
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I", 4)
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order, version = ">", struct.unpack("<I", struct.pack(">I", version))[0]
        if version not in _VERSIONS:
            raise ValueError(f"it has the version {version}, which is not known")
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
            raise ValueError(f"its tensors need {start + max(ends):,} bytes, and it has fewer")

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
        """Raise ValueError where ``count`` things of at least ``width`` bytes do not follow."""
        if count * width > len(self._data) - self._offset:
            raise ValueError(f"it declares {count:,} {what} and ends before them")

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            self._take(_WIDTHS[kind])
        elif kind == _STRING:
            self._take(self._number("Q", 8))
        elif kind == _ARRAY and depth < _MAX_NESTING:
            self._skip_array(depth)
        else:
            raise ValueError(f"it holds a value of the type {kind}, which is not known")

    def _skip_array(self, depth: int) -> None:
        kind, count = self._number("I", 4), self._number("Q", 8)
        if kind not in _LEAST:
            raise ValueError(f"it holds a list of the type {kind}, which is not known")
        self._expect(count, _LEAST[kind], "values")
        if kind in _WIDTHS:
            self._offset += count * _WIDTHS[kind]
            return
        for _ in range(count):
            self._skip_value(kind, depth + 1)

    def _tensor_end(self) -> int:
        """Return where the bytes of the next tensor end, behind the declarations."""
        name, dimensions = self._string(), self._number("I", 4)
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions")
        shape = [self._number("Q", 8) for _ in range(dimensions)]
        kind, offset = self._number("I", 4), self._number("Q", 8)
        if kind not in self._sizes:
            raise ValueError(f"its tensor {name} has the type {kind}, which is not known")
        block, width = self._sizes[kind]
        return offset + prod(shape) * width // block
