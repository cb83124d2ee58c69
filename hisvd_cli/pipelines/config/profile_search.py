"""Which ``hisvd.toml`` applies where none is named: the nearest one upward that is the user's own.

Whoever can write a folder above the current one could otherwise choose the settings of everybody
who works below it. So the search ends at the home folder, at the boundary of a file system, and at
anything that another user owns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROFILE_NAME = "hisvd.toml"


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        profile: the profile to read; None where there is none.
        foreign: a profile at which the search ended because it, or its folder, is another user's.
    """

    profile: Path | None = None
    foreign: Path | None = None


def search_profile(start: Path) -> Search:
    """Look for a profile in ``start`` and above it, to the end of what belongs to the user."""
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
    except OSError:  # a folder that cannot be looked at is nobody's own
        pass
    return Search()


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (RuntimeError, OSError):  # an account without a home folder
        return None


def _is_own(path: Path) -> bool:
    """Tell whether a path belongs to this user, and what it links to as well.

    Windows has neither numbers of users nor, as a rule, folders that several of them write.
    """
    user = getattr(os, "getuid", None)
    return user is None or {path.lstat().st_uid, path.stat().st_uid} == {user()}
