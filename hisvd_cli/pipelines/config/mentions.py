"""Settings that a message mentions, shown as flags on the command line and keywords in Python.

A message mentions a setting by its profile key in backquotes: ``eval.windows``, or
``no eval.windows`` for its opposite, and an argument of a command by its name: ``overwrite``. A
value is given in the backquotes, ``output=folder``, or follows them if it is a number or one of the
known values of the setting.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from hisvd_cli.pipelines.config.settings import (
    ARGUMENTS,
    SECTIONS,
    choices_of,
    flag_of,
    item_of,
    kind_of,
)

_MENTION = re.compile(
    r"`(no )?([a-z_-]+)(?:\.([a-z_]+))?(?:=([^`]*))?`(?: ([\w-]+(?:\.\d+)?)(?![\w-]))?"
)
_SWITCHES = {"overwrite", "private", "fresh", "update-card"}
_FORMS = ("hf", "pt", "dense")
_NAMES = {*ARGUMENTS, "path"}
"""Arguments of commands, and of methods in Python."""


@dataclasses.dataclass(frozen=True)
class Mention:
    """A mentioned setting or argument.

    Attributes:
        flag: its flag.
        kind: the type of a single value.
        off: whether its opposite is meant.
        value: the value that the message gives it, if any.
    """

    flag: str
    kind: Any
    off: bool = False
    value: str | None = None


def in_flags(message: str) -> str:
    """Return a message with flags in place of the settings that it mentions."""
    return replace(message, _as_flag)


def _as_flag(mention: Mention) -> str:
    flag = mention.flag.replace("--", "--no-", 1) if mention.off else mention.flag
    return flag if mention.value is None else f"{flag} {mention.value}"


def replace(message: str, named: Callable[[Mention], str]) -> str:
    """Return a message with other text in place of every setting that it mentions.

    Args:
        message: the message.
        named: returns the text for a mention.
    """

    def text(found: re.Match[str]) -> str:
        off, section, key, value, after = found.groups()
        mention = mention_of(section, key)
        if mention is None:
            return found[0]
        if value is None and after is not None and _is_value(after, mention, section, key):
            value, after = after, None
        shown = named(dataclasses.replace(mention, off=bool(off), value=value))
        return shown if after is None else f"{shown} {after}"

    return _MENTION.sub(text, message)


def mention_of(section: str, key: str | None = None) -> Mention | None:
    """Return the mention of a setting, or (without a key) of an argument; None if it is unknown."""
    if key is None:
        kind = bool if section in _SWITCHES else str
        return Mention(f"--{section}", kind) if section in _NAMES else None
    if section not in SECTIONS or key not in SECTIONS[section].model_fields:
        return None
    return Mention(flag_of(section, key), item_of(kind_of(section, key)))


def _is_value(text: str, mention: Mention, section: str, key: str | None) -> bool:
    """Return whether a word after a mention is its value."""
    if mention.kind in (int, float):
        return re.fullmatch(r"\d+(\.\d+)?", text) is not None
    if key is None:
        return section == "to" and text in _FORMS
    return text in choices_of(section, key)
