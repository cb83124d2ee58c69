"""Converts validation errors of pydantic to lines that name the setting and its origin."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic_core import ErrorDetails

from hisvd_cli.modeling.pickles.records import clean
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.resolved import toml_text
from hisvd_cli.pipelines.config.settings import SECTIONS, flag_of, item_of, kind_of
from hisvd_cli.utils.errors import suggest

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
Problems = list[tuple[Key, str]]
"""Problems of settings: the setting, and a line of text."""


def describe(detail: ErrorDetails, origins: Mapping[Key, str], profile: str) -> tuple[Key, str]:
    """Return the setting of a validation error, and a line with origin, value and reason."""
    section, key = (*(str(part) for part in detail["loc"]), "")[:2]
    name = f"{section}.{key}" if key else section
    origin = origins.get((section, key), profile)
    if detail["type"] == "extra_forbidden":
        return (section, key), f"{profile}: {name}: no such setting. {_place(section, key)}"
    if origin == profile:
        line = f"{profile}: {name} = {clean(toml_text(detail['input']))}"
    else:
        given = clean(str(detail["input"]))
        line = f"{origin}{' ' if origin == flag_of(section, key) else '='}{given}"
    return (section, key), f"{line} {_reason(detail, section, key)}"


def _place(section: str, key: str) -> str:
    """Return a suggestion for an unknown key."""
    if key:
        return suggest(key, SECTIONS[section].model_fields)
    homes = [f"[{name}]" for name, model in SECTIONS.items() if section in model.model_fields]
    return f"It belongs to {' or '.join(homes)}." if homes else suggest(section, SECTIONS)


def _reason(detail: ErrorDetails, section: str, key: str) -> str:
    """Return the condition that a value violates."""
    kind, value = detail["type"], detail["input"]
    if kind in ("value_error", "assertion_error"):  # from a validator of a method's options
        return f"is invalid: {detail['msg'].partition(', ')[2].removesuffix('.')}."
    if not key:
        return f"is not a table: write [{section}] above its keys."
    if key in ("ratio", "bytes_ratio") and kind in ("greater_than", "less_than_equal"):
        return "must be above 0 and at most 1."
    if kind == "literal_error":
        choices = str(detail["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), choices.split("'")[1::2], n=1)
        return f"must be {choices}." + (f" Did you mean '{near[0]}'?" if near else "")
    if kind == "too_short":
        return "must name at least one."
    if kind == "int_parsing_size":
        return "has too many digits."
    if kind == "string_unicode":
        return "must be valid Unicode text."
    if kind == "int_from_float" or kind.endswith(("_type", "_parsing")):
        wanted = item_of(kind_of(section, key))
        quoted = isinstance(value, str) and kind.endswith("_type")
        if wanted in _TYPES:
            return f"must be {_TYPES[wanted]}{', without quotes' * quoted}."
    return f"must be {detail['msg'].removeprefix('Input should be ')}."
