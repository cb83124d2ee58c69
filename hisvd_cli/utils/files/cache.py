"""The cache folder, and hints for paths that cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hisvd_cli.utils.errors import UsageError

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
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


def write_hint(path: Path, error: BaseException | None = None) -> str:
    """Return a hint for the case that ``path`` cannot be written.

    Args:
        path: the file or folder.
        error: why, if known; unless it is about permissions, the disk may be full.
    """
    root = cache_root().absolute()
    refused = isinstance(error, OSError) and error.errno in _REFUSED
    if path.absolute() == root or root in path.absolute().parents:
        remedy = "Check the permissions of" if refused else "Free some space in"
        return f"{remedy} {root}, or set HISVD_CACHE to another folder."
    if refused:
        return f"Check the permissions of {path.absolute().parent}, or choose another folder."
    return _SPACE_HINT
