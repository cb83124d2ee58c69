"""Temporary folders: all in one place, each with its owner in its name, and gone with it.

A process that is killed leaves its own; the next command removes what has no owner any more.
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
"""What runs leave in the cache to go on with."""
_HINT = "Name another folder with --scratch, or another cache in HISVD_CACHE."


def scratch_root(named: str | None) -> Path:
    """Return the folder of temporary files: as the settings name it, else one in the cache."""
    return expanded(named) if named else cache_root() / "scratch"


@contextmanager
def scratch_folder(named: str | None) -> Iterator[Path]:
    """Make a temporary folder, for while the body runs.

    Args:
        named: ``scratch`` of the settings.

    Raises:
        OutputError: it cannot be made, or what is written there does not fit.
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
    """Remove temporary folders whose process has ended, and what a run left in the cache a week
    ago or longer to go on with.

    Args:
        named: ``scratch`` of the settings.
    """
    with suppress(OSError):  # a folder that cannot be read or written stops no command
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
    """Remove what a run left to go on with, where nobody has gone on with it for a week."""
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
    """Tell whether a process holds a lock. The file of one that nobody holds is removed."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            with suppress(OSError):
                lock.unlink()  # while it is held, as in building()
            return False
    except (Timeout, OSError):
        return True
