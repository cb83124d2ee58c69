"""Folders that are built block by block, survive a kill, and appear only when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hisvd_cli.errors import OutputError
from hisvd_cli.tensorfile import SPACE_HINT, write_text

_KEY = "key"


def partial_path(folder: Path) -> Path:
    """Return where ``folder`` is built before it takes its name."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def building(folder: Path, key: str) -> Iterator[Path]:
    """Yield a folder to build in; it replaces ``folder`` once the body has succeeded.

    What an interrupted run with the same ``key`` left there is kept, so that the body can go on
    after it; what a run with another key left is removed.

    Args:
        folder: the final place. What stands there is replaced, only at the very end.
        key: hash of everything that the content depends on.

    Raises:
        OutputError: another run is building the same folder, or it cannot be written.
    """
    partial = partial_path(folder)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(partial.with_suffix(".lock"), timeout=0):
            _prepare(partial, key)
            yield partial
            (partial / _KEY).unlink()
            _swap(partial, folder)
        partial.with_suffix(".lock").unlink(missing_ok=True)
    except Timeout as error:
        raise OutputError(
            f"Another hisvd run is writing {folder}.", "Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}.", SPACE_HINT) from error


def _prepare(partial: Path, key: str) -> None:
    record = partial / _KEY
    if partial.is_dir() and (not record.is_file() or record.read_text() != key):
        shutil.rmtree(partial)
    if not partial.is_dir():
        partial.mkdir()
        write_text(record, key)


def _swap(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
