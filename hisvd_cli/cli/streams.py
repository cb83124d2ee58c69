"""Standard streams whose errors do not abort a run: closed, broken pipe, full disk, encoding."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from hisvd_cli.utils.errors import OutputError, reason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _FaultTolerant(io.RawIOBase):
    """A raw stream that records the first write error and discards everything after it.

    Args:
        raw: the underlying stream.
        was_closed: whether the stream was closed (``>&-``) when Python started.
    """

    def __init__(self, raw: io.RawIOBase, was_closed: bool) -> None:
        self._raw = raw
        self.was_closed = was_closed
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._raw.isatty()

    def write(self, data: ReadableBuffer, /) -> int | None:
        """Write data and return its length, also after an error."""
        if self.failure is None:
            try:
                return self._raw.write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """Replace the standard streams of this process, before anything is written to them.

    Output to a closed stream (``>&-``) is discarded; characters without an encoding are replaced.
    """
    _open_descriptors()
    sys.stdout = _fault_tolerant(sys.stdout, 1)
    sys.stderr = _fault_tolerant(sys.stderr, 2)


def _open_descriptors() -> None:
    """Open closed descriptors 0 to 2, which would otherwise be reused for the next opened file and
    receive the output of libraries."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


def _fault_tolerant(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # it was closed when Python started
        raw: object = io.FileIO(number, "w", closefd=False)
    else:
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED removes the buffer
    if not isinstance(raw, io.RawIOBase):  # replaced in this process, such as by a test
        return stream or io.StringIO()
    return io.TextIOWrapper(
        io.BufferedWriter(_FaultTolerant(raw, stream is None)),
        encoding=stream.encoding if stream else "utf-8",
        errors="replace" if number == 1 else "backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
    )


def check_open(stream: TextIO) -> None:
    """Check, before any work, that a result that is only printed is not lost.

    Raises:
        OutputError: stdout was closed when the process started.
    """
    if getattr(_raw(stream), "was_closed", False):
        raise OutputError(
            "stdout is closed, so that the result would be lost.",
            "Redirect stdout to a file, or to /dev/null.",
        )


def _raw(stream: TextIO) -> object:
    return getattr(getattr(stream, "buffer", None), "raw", None)


def check_written() -> None:
    """Check that all of stdout was written; a closed pipe is not an error.

    Raises:
        OutputError: writing failed.
    """
    stream = sys.stdout
    stream.flush()
    raw = _raw(stream)
    failure = raw.failure if isinstance(raw, _FaultTolerant) else None
    if failure is not None and not isinstance(failure, BrokenPipeError):
        raise OutputError(
            f"Cannot write to stdout: {reason(failure)}",
            "The command itself has completed. Redirect its output elsewhere.",
        ) from failure
