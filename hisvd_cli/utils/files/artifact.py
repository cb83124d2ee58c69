"""Folders that are built block by block, survive a kill, and appear only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.atomic import TEMPORARY, write_text
from hisvd_cli.utils.files.cache import write_hint
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.versions import versions

# With the name of the tool in them: a user may keep '.api.key' or '.config.old' beside an output.
_KEY, _LOCK, _OLD = "hisvd.key", "hisvd.lock", "hisvd.old"


def partial_path(folder: Path) -> Path:
    """Return where ``folder`` is built before it takes its name."""
    return _beside(folder, "partial")


def standing_at(folder: Path) -> Path:
    """Return where the folder is that stands at ``folder``: beside it, if a run was killed while
    the new one took its name."""
    old = _beside(folder.resolve(), _OLD)
    return old if old.is_dir() and not os.path.lexists(folder) else folder


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
    partial, lock, record = partial_path(folder), _beside(folder, _LOCK), _beside(folder, _KEY)
    key = digest(key, *versions().values())
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                standing = _standing(folder)
                _prepare(partial, record, key)
                yield partial
                _swap(partial, folder, standing)
                record.unlink()
            finally:
                # Removed while it is held: whoever gets it next has made a new one.
                with suppress(OSError):
                    lock.unlink()
    except Timeout as error:
        if not lock.exists():  # some file systems, such as /proc, take no new files
            raise OutputError(
                f"Cannot create files beside {folder}.", write_hint(folder)
            ) from error
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
    if (old := standing_at(folder)) != folder:
        old.rename(folder)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _swap(partial: Path, folder: Path, standing: Collection[str]) -> None:
    """Give a folder its name, with what was put into the one before it meanwhile, and is not in
    ``standing``. A kill at any moment leaves all of that in one of the two. Raises OSError."""
    old = _beside(folder, _OLD)
    if folder.exists():
        for path in folder.iterdir():
            if path.name not in standing and not path.match(TEMPORARY):
                _copy(path, _free(partial, path.name))
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while it removed it
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _free(folder: Path, name: str) -> Path:
    """Return a path in a folder at which nothing is: ``name``, else with a number behind it."""
    names = (folder / (f"{name}.{i}" if i else name) for i in count())
    return next(path for path in names if not os.path.lexists(path))


def _copy(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True)
    else:
        shutil.copy2(path, target, follow_symlinks=False)
