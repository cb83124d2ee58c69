"""Finds the ``hisvd.toml`` that applies if the user names no profile: the nearest parent's.

The search stops at the home folder, at a file system boundary, and at anything that another user
owns. Otherwise, a user with write access to a parent folder could change the settings of others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROFILE_NAME = "hisvd.toml"


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        profile: the profile to read, if any.
        foreign: a profile that stopped the search because another user owns it or its folder.
    """

    profile: Path | None = None
    foreign: Path | None = None


def search_profile(start: Path) -> Search:
    """Search ``start`` and its parents for a profile, as long as the user owns them."""
    start = start.resolve()
    home = _home()
    try:
        device = start.stat().st_dev
        for folder in (start, *start.parents):
            if folder.stat().st_dev != device:
                break
            profile = folder / PROFILE_NAME
            if profile.is_file():
                own = _is_own(folder) and _is_own(profile)
                return Search(profile) if own else Search(foreign=profile)
            if folder == home or not _is_own(folder):
                break
    except OSError:  # a folder that cannot be read ends the search
        pass
    return Search()


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (RuntimeError, OSError):  # an account without a home folder
        return None


def _is_own(path: Path) -> bool:
    """Return whether this user owns a path and the target of a link. Always true on Windows, which
    has no user ids."""
    user = getattr(os, "getuid", None)
    return user is None or {path.lstat().st_uid, path.stat().st_uid} == {user()}
