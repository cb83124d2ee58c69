"""Writes text to a path of the user: files atomically, streams, devices and pipes directly."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.cache import write_hint

_PATIENCE = 1.0
"""Seconds to wait for a process that opens a named pipe for reading."""
_held: dict[tuple[int, int], int] = {}
"""Device and inode → descriptor of named pipes that were checked and are not written yet."""


def takes_text(path: Path) -> bool:
    """Return whether a path is written to directly: stdout or stderr (even if redirected to a
    file), a character device, or a pipe."""
    return _descriptor(path) is not None or path.is_char_device() or path.is_fifo()


def check_text_place(path: Path, argument: str) -> None:
    """Check, before any work, that text can be written to a path. A named pipe stays open, so that
    its reader waits for the text.

    Args:
        path: a file, or a path that :func:`takes_text`.
        argument: the name of the argument that set it, such as ``output``.

    Raises:
        OutputError: the path is a folder, a socket or a block device, is not writable, or is a
            named pipe that no process reads.
    """
    another = f"Choose another file with `{argument}`."
    if path.is_dir():
        raise OutputError(f"`{argument}={path}` is a folder.", "Give the path of a file.")
    if takes_text(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"`{argument}={path}` is not writable.", another)
        if _descriptor(path) is None and path.is_fifo():
            _hold(path)
        return
    if path.exists() and not path.is_file():
        raise OutputError(f"`{argument}={path}` is neither a file nor a pipe.", another)
    home = next(folder for folder in path.resolve().parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise OutputError(f"Cannot write `{argument}={path}`: {home} is not writable.", another)


def write_through(path: Path, text: str) -> None:
    """Write text: atomically to a regular file (following links), directly to anything else.
    Raises OutputError."""
    if not takes_text(path):
        write_text(path.resolve(), text)
        return
    # Opening a redirected stream again would overwrite the file from its start.
    number = _descriptor(path)
    try:
        descriptor = _open(path) if number is None else os.dup(number)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except BrokenPipeError:  # the reader has closed the pipe early, as head does
        return
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {reason(error)}", write_hint(path, error)
        ) from error


def _open(path: Path) -> int:
    """Return a descriptor to write to a device or a named pipe. Raises OSError, OutputError."""
    if not path.is_fifo():
        return os.open(path, os.O_WRONLY)
    _hold(path)
    return _held.pop(_identity(path))


def _hold(path: Path) -> None:
    """Open a named pipe, unless it is held already. Opening one that no process reads would block
    for ever; closing it again before the text is written would end its reader.

    Raises:
        OutputError: no process reads the pipe, or it cannot be opened.
    """
    if _identity(path) in _held:
        return
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise OutputError(
                    f"Cannot open {path}: {reason(error)}", write_hint(path, error)
                ) from error
            if time.monotonic() > deadline:
                raise OutputError(
                    f"No process reads the named pipe {path}.",
                    f"Start its reader first, such as: cat {path} &",
                ) from error
        time.sleep(_PATIENCE / 20)
    os.set_blocking(descriptor, True)
    _held[_identity(path)] = descriptor


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _descriptor(path: Path) -> int | None:
    """Return 1 or 2 if a path refers to the stdout or stderr of this process, else None."""
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), path.stat()):
                return number
    return None
