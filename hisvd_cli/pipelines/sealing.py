"""Checksums of intermediate results in runs of one or several processes."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.files.checksums import seal, sealed


def seal_together(path: Path) -> None:
    """Have the first process seal a finished folder or file, so that a resumed run detects damage;
    the others wait for it."""
    if world().first:
        seal(path)
    world().wait()


def sealed_together(path: Path) -> bool:
    """Return the same answer in all processes: whether a folder or file is sealed and
    unchanged."""
    return world().agreed(lambda: sealed(path))
