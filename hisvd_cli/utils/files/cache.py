"""Where hisvd keeps what it makes when the user names no place."""

from __future__ import annotations

import os
from pathlib import Path

from hisvd_cli.utils.errors import UsageError

_SPACE_HINT = "Free some space or choose another folder; a rerun goes on after the last block."


def expanded(name: str) -> Path:
    """Return a path with ``~`` and ``~user`` replaced; as shells do, a user that there is not stays
    a plain name."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def cache_root() -> Path:
    """Return ``$HISVD_CACHE``, else ``hisvd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        UsageError: ``HISVD_CACHE`` begins with ``~`` and the name of an unknown user.
    """
    if named := os.environ.get("HISVD_CACHE"):
        root = expanded(named)
        if root.parts[0].startswith("~"):
            raise UsageError(
                f"HISVD_CACHE is '{named}', and there is no user '{root.parts[0][1:]}'.",
                "Set HISVD_CACHE to an existing folder or one that can be created.",
            )
        return root
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hisvd"


def write_hint(path: Path) -> str:
    """Say what to do where ``path`` cannot be written."""
    root = cache_root().absolute()
    if path.absolute() == root or root in path.absolute().parents:
        return f"Free some space in {root}, or name another folder in HISVD_CACHE."
    return _SPACE_HINT
