"""A file reader with limits on bytes, line length and decompressed size."""

from __future__ import annotations

from typing import IO

from hisvd_cli.modeling.pickles.records import RefusedError

MAX_PICKLE_BYTES = 1 << 30
# Allowed size of an unpacked pickle beyond the file size; compression can reach a factor of 1000.
_FREE_BYTES = 1 << 24
MAX_LINE_BYTES = 1 << 20


def check_inflated(size: int, file_bytes: int) -> None:
    """Raise RefusedError if a compressed pickle is too large for its file size."""
    if size > _FREE_BYTES + file_bytes:
        raise RefusedError(f"its pickle unpacks to {size:,} bytes, the file has {file_bytes:,}")


class BoundedReader:
    """The file methods that `genops` uses, with a limit on the bytes read."""

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
        if b"\\" in line:  # genops would unescape it, unlike a loader
            raise RefusedError("a global's name contains a backslash")
        return self._advance(line)

    def tell(self) -> int:
        """Return the number of bytes read so far."""
        return self._position

    def _advance(self, data: bytes) -> bytes:
        self._position += len(data)
        return data
