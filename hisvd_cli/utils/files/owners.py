"""Which process a temporary file belongs to, told by its name, and whether that one still runs.

A name holds the machine, the process and its start: another container on the same disk numbers its
processes anew, and so does the same machine after a while.
"""

from __future__ import annotations

import os
import platform
import re
import time
import zlib
from functools import cache
from pathlib import Path

import psutil

TAG = r"([0-9a-f]{4})-(\d+)-([0-9a-f]{4})"
"""Matches what :func:`own_tag` returns."""
WEEK_SECONDS = 7 * 24 * 3600.0
"""What nobody has touched for so long counts as abandoned, whoever made it."""


def own_tag() -> str:
    """Return the text that names this process in the names of its temporary files."""
    return _tag(os.getpid())


@cache
def _tag(process: int) -> str:
    return f"{_machine()}-{process}-{_started(process) or ''}"


def is_abandoned(tag: str, path: Path) -> bool:
    """Tell whether nobody will come back to a temporary file or folder.

    Args:
        tag: of its owner.
        path: where it is.
    """
    found = re.fullmatch(TAG, tag)
    if found is None:
        return False
    machine, process, started = found.groups()
    if machine == _machine():
        return _started(int(process)) != started
    return untouched(path)


def untouched(path: Path) -> bool:
    """Tell whether nothing was written to a file, or made in a folder, for a week."""
    try:
        return time.time() - path.stat().st_mtime > WEEK_SECONDS
    except OSError:
        return False


@cache
def _machine() -> str:
    spaces = Path("/proc/self/ns/pid")
    named = str(spaces.readlink()) if spaces.is_symlink() else ""
    return f"{zlib.crc32(f'{platform.node()} {named}'.encode()) & 0xFFFF:04x}"


def _started(process: int) -> str | None:
    """Return the time at which a process started, short; None where there is no such process."""
    try:
        status = Path(f"/proc/{process}/stat")
        if Path("/proc/self/stat").is_file():
            # In ticks since the machine started, which no clock that is set changes.
            text = status.read_text(encoding="utf-8", errors="replace")
            ticks = int(text.rpartition(")")[2].split()[19])
        else:
            ticks = int(psutil.Process(process).create_time() * 100)
    except (OSError, psutil.Error):
        return None
    return f"{ticks & 0xFFFF:04x}"
