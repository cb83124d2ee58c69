"""Writes text to a path of the user: files atomically, streams, devices and pipes directly."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.cache import write_hint


def takes_text(path: Path) -> bool:
    """Return whether a path is written to directly: stdout or stderr (even if redirected to a
    file), a character device, or a pipe."""
    return _descriptor(path) is not None or path.is_char_device() or path.is_fifo()


def check_text_place(path: Path, argument: str) -> None:
    """Check, before any work, that text can be written to a path.

    Args:
        path: a file, or a path that :func:`takes_text`.
        argument: the name of the argument that set it, such as ``output``.

    Raises:
        OutputError: the path is a folder, a socket or a block device, or is not writable.
    """
    another = f"Choose another file with `{argument}`."
    if path.is_dir():
        raise OutputError(f"`{argument}={path}` is a folder.", "Give the path of a file.")
    if takes_text(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"`{argument}={path}` is not writable.", another)
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
        descriptor = os.open(path, os.O_WRONLY) if number is None else os.dup(number)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except BrokenPipeError:  # the reader has closed the pipe early, as head does
        return
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {reason(error)}", write_hint(path)) from error


def _descriptor(path: Path) -> int | None:
    """Return 1 or 2 if a path refers to the stdout or stderr of this process, else None."""
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), path.stat()):
                return number
    return None
