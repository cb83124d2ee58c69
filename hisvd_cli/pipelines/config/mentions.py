"""Settings that a message mentions, shown as flags on the command line and keywords in Python.

A message mentions a setting by its profile key in backquotes: ``eval.windows``, or
``no eval.windows`` for its opposite, and an argument of a command by its name: ``overwrite``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from hisvd_cli.pipelines.config.settings import ARGUMENTS, SECTIONS, flag_of

_MENTION = re.compile(r"`(no )?([a-z_-]+)(?:\.([a-z_]+))?`")


def in_flags(message: str) -> str:
    """Return a message with flags in place of the settings that it mentions."""
    return replace(message, lambda flag, off: flag.replace("--", "--no-", 1) if off else flag)


def replace(message: str, named: Callable[[str, bool], str]) -> str:
    """Return a message with another name in place of every setting that it mentions.

    Args:
        named: maps the flag of a setting, and whether its opposite is meant, to its name.
    """

    def name(found: re.Match[str]) -> str:
        off, section, key = found.groups()
        flag = _flag(section, key)
        return named(flag, bool(off)) if flag else found[0]

    return _MENTION.sub(name, message)


def _flag(section: str, key: str | None) -> str | None:
    if key is None:
        return f"--{section}" if section in ARGUMENTS else None
    known = section in SECTIONS and key in SECTIONS[section].model_fields
    return flag_of(section, key) if known else None
