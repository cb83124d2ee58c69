"""Folders that are built step by step, can be resumed, and appear only when complete."""

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

# Prefixed, because users may have files such as '.api.key' or '.config.old' beside an output.
_KEY, _LOCK, _OLD = "hisvd.key", "hisvd.lock", "hisvd.old"


def partial_path(folder: Path) -> Path:
    """Return the path at which ``folder`` is built before it is renamed."""
    return _beside(folder, "partial")


def standing_at(folder: Path) -> Path:
    """Return where the content of ``folder`` is: under its backup name if a run was killed between
    the two renames that replace it, else ``folder`` itself."""
    old = _beside(folder.resolve(), _OLD)
    return old if old.is_dir() and not os.path.lexists(folder) else folder


@contextmanager
def building(folder: Path, key: str) -> Iterator[Path]:
    """Yield a folder to build in; it replaces ``folder`` when the body succeeds.

    Files of an interrupted run with the same ``key`` are kept, so that the body can resume; those
    of a run with another key or other library versions are removed. The body must rebuild damaged
    files.

    Args:
        folder: the final path. An existing folder is replaced only at the end.
        key: hash of everything that the content depends on: its inputs and its layout.

    Raises:
        OutputError: another run is building the same folder, or it cannot be written.
    """
    folder = folder.resolve()  # keeps symbolic links in place, and gives '.' a name
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
                # Removed while held, so that the next process creates a new lock file.
                with suppress(OSError):
                    lock.unlink()
    except Timeout as error:
        if not lock.exists():  # some file systems, such as /proc, do not allow new files
            raise OutputError(
                f"Cannot create files beside {folder}.", write_hint(folder)
            ) from error
        raise OutputError(
            f"Another hisvd run is writing {folder}.", "Wait for it or choose another folder."
        ) from error
    except OSError as error:
        raise OutputError(
            f"Cannot write {folder}: {reason(error)}", write_hint(folder, error)
        ) from error


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _prepare(partial: Path, record: Path, key: str) -> None:
    # The key is stored beside the folder, not in it: a run that is killed during the rename leaves
    # either a folder that can be resumed, or a complete folder without extra files.
    if partial.is_dir() and (not record.is_file() or record.read_bytes() != key.encode()):
        record.unlink(missing_ok=True)  # first: a partly removed folder must not be resumed
        shutil.rmtree(partial)
    write_text(record, key)
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob(TEMPORARY):  # files that a killed run was writing
        leftover.unlink()


def _standing(folder: Path) -> set[str]:
    """Return the names of the entries of the folder that will be replaced. A backup left by a
    killed run is restored first. Raises OSError."""
    if (old := standing_at(folder)) != folder:
        old.rename(folder)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _swap(partial: Path, folder: Path, standing: Collection[str]) -> None:
    """Rename ``partial`` to ``folder``. Entries that were added to the existing folder meanwhile
    (not in ``standing``) are copied over; a kill at any moment loses none of them. Raises
    OSError."""
    old = _beside(folder, _OLD)
    if folder.exists():
        for path in folder.iterdir():
            if path.name not in standing and not path.match(TEMPORARY):
                _copy(path, _free(partial, path.name))
        shutil.rmtree(old, ignore_errors=True)  # a killed run may have left it partly removed
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _free(folder: Path, name: str) -> Path:
    """Return an unused path in a folder: ``name``, or ``name`` with a number appended."""
    names = (folder / (f"{name}.{i}" if i else name) for i in count())
    return next(path for path in names if not os.path.lexists(path))


def _copy(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True)
    else:
        shutil.copy2(path, target, follow_symlinks=False)
