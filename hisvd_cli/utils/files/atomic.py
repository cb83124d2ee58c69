"""Atomic file writing: files have a temporary name until they are complete."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.cache import write_hint
from hisvd_cli.utils.files.owners import TAG, is_abandoned, own_tag

TEMPORARY = ".*.tmp"
"""Matches temporary files that a killed run may leave."""
_OWNED = re.compile(rf"\..+\.({TAG})\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that is renamed to it when the body succeeds.

    Raises:
        OutputError: the file cannot be written.
    """
    # Two processes may write the same cache file, so each uses its own temporary name.
    temporary = path.with_name(f".{path.name}.{own_tag()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent.absolute())
        yield temporary
        with temporary.open("rb+") as file:  # Windows only flushes files open for writing
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors creates files only the owner can read
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {reason(error)}", write_hint(path, error)
        ) from error
    finally:
        with suppress(OSError):  # the path may not be accessible at all
            temporary.unlink()


@cache
def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files of killed processes, once per folder."""
    for path in folder.glob(TEMPORARY):
        owned = _OWNED.fullmatch(path.name)
        if owned and is_abandoned(owned[1], path):
            path.unlink(missing_ok=True)


def _umask() -> int:
    # The only portable way to read the umask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OutputError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
