"""Temporary folders, named after the process that owns them.

Folders of killed processes are removed by the next command.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.cache import cache_root, expanded
from hisvd_cli.utils.files.owners import TAG, is_abandoned, own_tag, untouched

_OWNED = re.compile(rf"hisvd-({TAG})-\w+")
_WORK = "hisvd.work"
BUILDING = rf"partial|{re.escape(_WORK)}|hisvd\.(key|lock|old)"
"""Suffixes of the hidden files and folders beside an output while it is made, as a pattern."""
_RESUMABLE = (
    "evaluations/states",
    "calibration/*/.*.partial",
    "calibration/*/*/inputs",
    "calibration/*/*/.*.partial",
    "gguf/.*.partial",
)
"""Cache entries that interrupted runs leave for resuming."""
_HINT = "Choose another folder with `model.scratch`, or another cache with HISVD_CACHE."


def scratch_root(named: str | None) -> Path:
    """Return the folder for temporary files: that of the settings, or else one in the cache."""
    return expanded(named) if named else cache_root() / "scratch"


@contextmanager
def scratch_folder(named: str | None) -> Iterator[Path]:
    """Create a temporary folder for the body, and remove it afterwards.

    Args:
        named: the setting ``model.scratch``.

    Raises:
        OutputError: it cannot be created, or the disk is full.
    """
    root = scratch_root(named)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"hisvd-{own_tag()}-", dir=root))
    except OSError as error:
        raise OutputError(
            f"Cannot use {root} for temporary files: {reason(error)}", _HINT
        ) from error
    try:
        yield folder
    except OutputError as error:
        if str(folder) in error.message:
            raise OutputError(error.message, f"Free some space. {_HINT}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(named: str | None) -> None:
    """Remove temporary folders of processes that have ended, and resumable work in the cache that
    was not touched for a week.

    Args:
        named: the setting ``model.scratch``.
    """
    with suppress(OSError):  # an inaccessible folder must not stop a command
        for folder in scratch_root(named).iterdir():
            owned = _OWNED.fullmatch(folder.name)
            if owned and is_abandoned(owned[1], folder):
                shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        held(cache_root() / "evaluations" / ".states.lock")
        for pattern in _RESUMABLE:
            for folder in cache_root().glob(pattern):
                expire(folder)


def expire(folder: Path) -> None:
    """Remove the resumable work in ``folder`` if it was not touched for a week."""
    if untouched(folder) and not any(map(held, folder.parent.glob(".*.lock"))):
        shutil.rmtree(folder, ignore_errors=True)


def work_folder(output: Path) -> Path:
    """Return the hidden folder beside an output for the results of the steps before the last one,
    which an interrupted run resumes from."""
    return output.with_name(f".{output.name}.{_WORK}")


def clear_beside(output: Path) -> None:
    """Remove the work folder of a finished output, unless another run is using it."""
    work = work_folder(output)
    if not any(held(lock) for lock in work.glob(".*.lock")):
        shutil.rmtree(work, ignore_errors=True)


def held(lock: Path) -> bool:
    """Return whether a process holds a lock. The file of a lock that is not held is removed."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            with suppress(OSError):
                lock.unlink()  # while held, as in building()
            return False
    except (Timeout, OSError):
        return True
