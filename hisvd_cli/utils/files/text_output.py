"""Texts at a path that the user names, plans and reports: files are replaced whole, and streams,
devices and pipes are written to."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.cache import write_hint


def takes_text(path: Path) -> bool:
    """Tell whether a path is written to as it is: stdout and stderr, wherever they lead, a
    character device, or a pipe."""
    return _descriptor(path) is not None or path.is_char_device() or path.is_fifo()


def check_text_place(path: Path, flag: str) -> None:
    """Find out before any work whether a text can be written.

    Args:
        path: the file, or what :func:`takes_text`.
        flag: what named it.

    Raises:
        OutputError: a folder, a socket or a disk is there, or nothing can be written there.
    """
    another = f"Name another file with {flag}."
    if path.is_dir():
        raise OutputError(f"{flag} {path} is a folder.", "Name a file.")
    if takes_text(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"Cannot write to {flag} {path}.", another)
        return
    if path.exists() and not path.is_file():
        raise OutputError(f"{flag} {path} is neither a file nor a pipe.", another)
    home = next(folder for folder in path.resolve().parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise OutputError(f"Cannot write {flag} {path}: {home} takes no files.", another)


def write_through(path: Path, text: str) -> None:
    """Write a text: a regular file whole or not at all, through links to it; to anything else as it
    is. Raises OutputError."""
    if not takes_text(path):
        write_text(path.resolve(), text)
        return
    # Opened anew, a stream that leads to a file would begin at its start again.
    number = _descriptor(path)
    try:
        descriptor = os.open(path, os.O_WRONLY) if number is None else os.dup(number)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except BrokenPipeError:  # a reader that went away early has what it wants
        return
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {reason(error)}", write_hint(path)) from error


def _descriptor(path: Path) -> int | None:
    """Return 1 or 2 where a path leads to the stdout or stderr of this process."""
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), path.stat()):
                return number
    return None
