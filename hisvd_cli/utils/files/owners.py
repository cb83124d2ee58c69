"""Identifies the process that owns a temporary file, and whether it still runs.

The file name contains the machine, the process id and its start time, because process ids repeat
across containers that share a disk, and over time on the same machine.
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
"""Files that were not modified for this long are considered abandoned."""


def own_tag() -> str:
    """Return the tag that identifies this process in the names of its temporary files."""
    return _tag(os.getpid())


@cache
def _tag(process: int) -> str:
    return f"{_machine()}-{process}-{_started(process) or ''}"


def is_abandoned(tag: str, path: Path) -> bool:
    """Return whether the owner of a temporary file or folder has ended.

    For an owner on another machine, the file counts as abandoned if it was not modified for a week.

    Args:
        tag: the owner's tag.
        path: the file or folder.
    """
    found = re.fullmatch(TAG, tag)
    if found is None:
        return False
    machine, process, started = found.groups()
    if machine == _machine():
        return _started(int(process)) != started
    return untouched(path)


def untouched(path: Path) -> bool:
    """Return whether a file or folder was not modified for a week."""
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
    """Return a short hash of the start time of a process; None if there is no such process."""
    try:
        status = Path(f"/proc/{process}/stat")
        if Path("/proc/self/stat").is_file():
            # Ticks since boot, which do not depend on the system clock.
            text = status.read_text(encoding="utf-8", errors="replace")
            ticks = int(text.rpartition(")")[2].split()[19])
        else:
            ticks = int(psutil.Process(process).create_time() * 100)
    except (OSError, psutil.Error):
        return None
    return f"{ticks & 0xFFFF:04x}"
