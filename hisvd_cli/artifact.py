"""Folders that are built block by block, survive a kill, and appear only when complete."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hisvd_cli.cache import write_hint
from hisvd_cli.errors import OutputError
from hisvd_cli.paths import digest
from hisvd_cli.tensorfile import TEMPORARY, reason, write_text
from hisvd_cli.versions import versions


def partial_path(folder: Path) -> Path:
    """Return where ``folder`` is built before it takes its name."""
    return _beside(folder, "partial")


@contextmanager
def building(folder: Path, key: str) -> Iterator[Path]:
    """Yield a folder to build in; it replaces ``folder`` once the body has succeeded.

    What an interrupted run with the same ``key`` left there is kept, so that the body can go on
    after it; what a run with another key, or of other versions of the libraries, left is removed.
    The body makes anew what was damaged meanwhile.

    Args:
        folder: the final place. What stands there is replaced, only at the very end.
        key: hash of everything that the content depends on: what it is made from, and its layout.

    Raises:
        OutputError: another run is building the same folder, or it cannot be written.
    """
    folder = folder.resolve()  # a link stays a link to what is built, and '.' has a name
    partial, lock = partial_path(folder), _beside(folder, "lock")
    key = digest(key, *versions().values())
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                standing = _standing(folder)
                _prepare(partial, _beside(folder, "key"), key)
                yield partial
                _swap(partial, folder, standing)
                _beside(folder, "key").unlink()
            finally:
                # Removed while it is held: whoever gets it next has made a new one.
                with suppress(OSError):
                    lock.unlink()
    except Timeout as error:
        raise OutputError(
            f"Another hisvd run is writing {folder}.", "Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {reason(error)}", write_hint(folder)) from error


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _prepare(partial: Path, record: Path, key: str) -> None:
    # The key stands beside the folder, not in it: a run that is killed while the folder takes its
    # name then leaves either everything to go on with, or a complete folder and nothing else in it.
    if partial.is_dir() and (not record.is_file() or record.read_bytes() != key.encode()):
        record.unlink(missing_ok=True)  # first: a folder that is half removed is nobody's
        shutil.rmtree(partial)
    write_text(record, key)
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob(TEMPORARY):  # a killed run may have been writing a file
        leftover.unlink()


def _standing(folder: Path) -> set[str]:
    """Return the names of what stands in the folder that is to be replaced, put back first where a
    run was killed while its new one took the name. Raises OSError."""
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _swap(partial: Path, folder: Path, standing: Collection[str]) -> None:
    """Give a folder its name. What was put into the one before it meanwhile, and is not in
    ``standing``, moves over; what cannot stays beside it."""
    old = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    if not old.is_dir():
        return
    for path in [path for path in old.iterdir() if path.name not in standing]:
        if not (folder / path.name).exists():
            path.rename(folder / path.name)
    if all(path.name in standing for path in old.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
