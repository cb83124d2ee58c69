"""The cache folder, and hints for paths that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

from hisvd_cli.utils.errors import UsageError

_SPACE_HINT = (
    "Free some space or choose another folder; a rerun resumes after the last completed block."
)


def expanded(name: str) -> Path:
    """Return a path with ``~`` and ``~user`` expanded; unknown users are kept as in shells."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def cache_root() -> Path:
    """Return ``$HISVD_CACHE``, or else ``hisvd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        UsageError: ``HISVD_CACHE`` begins with ``~`` and the name of an unknown user.
    """
    if named := os.environ.get("HISVD_CACHE"):
        root = expanded(named)
        if root.parts[0].startswith("~"):
            raise UsageError(
                f"HISVD_CACHE is '{named}', but there is no user '{root.parts[0][1:]}'.",
                "Set HISVD_CACHE to an existing folder or one that can be created.",
            )
        return root
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hisvd"


def write_hint(path: Path) -> str:
    """Return a hint for the case that ``path`` cannot be written."""
    root = cache_root().absolute()
    if path.absolute() == root or root in path.absolute().parents:
        return f"Free some space in {root}, or set HISVD_CACHE to another folder."
    return _SPACE_HINT
