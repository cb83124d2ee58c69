"""Standard streams that never end a run: closed, without a reader, full, or of few characters."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from hisvd_cli.utils.errors import OutputError, reason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Forgiving(io.RawIOBase):
    """Hands bytes on until one write fails; that failure is kept, and the rest is dropped.

    Args:
        raw: where the bytes go.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Tell that bytes are taken, always."""
        return True

    def fileno(self) -> int:
        """Return the number that the operating system knows the stream by."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """Tell whether a terminal is behind it."""
        return self._raw.isatty()

    def write(self, data: ReadableBuffer, /) -> int | None:
        """Write what can be written; tell of all of it that it was."""
        if self.failure is None:
            try:
                return self._raw.write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """Make the standard streams of this process forgiving, before anything is written to them.

    A stream that was closed (``>&-``) leads nowhere. A character that the encoding of a stream
    lacks is replaced.
    """
    _open_descriptors()
    sys.stdout = _forgiving(sys.stdout, 1)
    sys.stderr = _forgiving(sys.stderr, 2)


def _open_descriptors() -> None:
    """Have the numbers 0 to 2 taken: the next file that is opened would get one that is free, and
    what libraries print would go into it."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)


def _forgiving(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # Python found it closed
        raw: object = io.FileIO(number, "w", closefd=False)
    else:
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is no buffer between
    if not isinstance(raw, io.RawIOBase):  # not the operating system's: whoever set it reads it
        return stream or io.StringIO()
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(raw)),
        encoding=stream.encoding if stream else "utf-8",
        errors="replace" if number == 1 else "backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
    )


def check_written() -> None:
    """Find out whether all of stdout was written. A reader that went away early has what it wants.

    Raises:
        OutputError: it was not.
    """
    stream = sys.stdout
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, _Forgiving) else None
    if failure is not None and not isinstance(failure, BrokenPipeError):
        raise OutputError(
            f"Cannot write to stdout: {reason(failure)}",
            "Nothing else is lost: what the command makes is there. Send its output elsewhere.",
        ) from failure
