"""Turns validation errors of pydantic into lines that name the setting and its origin."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic_core import ErrorDetails

from hisvd_cli.modeling.pickles.records import clean
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.resolved import toml_text
from hisvd_cli.pipelines.config.settings import SECTIONS, flag_of, item_of, kind_of
from hisvd_cli.utils.errors import suggest

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
Problems = list[tuple[Key, str]]
"""What is wrong, a line each, with the setting that it is about."""


def describe(detail: ErrorDetails, origins: Mapping[Key, str], profile: str) -> tuple[Key, str]:
    """Turn one of pydantic's findings into a line: from where, which setting, what is wrong."""
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
    """Say where a key that the profile may not hold there was meant to stand."""
    if key:
        return suggest(key, SECTIONS[section].model_fields)
    homes = [f"[{name}]" for name, model in SECTIONS.items() if section in model.model_fields]
    return f"It belongs to {' or '.join(homes)}." if homes else suggest(section, SECTIONS)


def _reason(detail: ErrorDetails, section: str, key: str) -> str:
    """Say what a value must be."""
    kind, value = detail["type"], detail["input"]
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
        return "must be a text of valid Unicode."
    if kind == "int_from_float" or kind.endswith(("_type", "_parsing")):
        wanted = item_of(kind_of(section, key))
        quoted = isinstance(value, str) and kind.endswith("_type")
        return f"must be {_TYPES[wanted]}{', without quotes' * quoted}."
    return f"must be {detail['msg'].removeprefix('Input should be ')}."
