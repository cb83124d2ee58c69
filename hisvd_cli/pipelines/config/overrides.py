"""Settings from environment variables and ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tomli

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.settings import SECTIONS, kind_of
from hisvd_cli.pipelines.config.validation_errors import Problems
from hisvd_cli.utils.errors import suggest
from hisvd_cli.utils.files.json_files import check_depth

_OTHER_VARIABLES = {"HISVD_CACHE", "HISVD_DEBUG"}


def _variable(section: str, key: str) -> str:
    return f"HISVD_{section}_{key}".upper()


def from_environment(
    environ: Mapping[str, str], problems: Problems
) -> Iterator[tuple[Key, Any, str]]:
    """Yield the settings in environment variables. Empty variables are ignored; lists are separated
    by commas."""
    known = {_variable(s, k): (s, k) for s, model in SECTIONS.items() for k in model.model_fields}
    for variable, text in sorted(environ.items()):
        if key := known.get(variable):
            many = isinstance(SECTIONS[key[0]].model_fields[key[1]].default, list)
            value = [part.strip() for part in text.split(",")] if many else text
            if text:
                yield key, value, variable
        elif near := _near_variable(variable, known):
            line = f"{variable}: no such setting. Did you mean '{near}'?"
            problems.append((("environment", variable), line))


def _near_variable(variable: str, known: Iterable[str]) -> str | None:
    """Return the setting that a misspelt variable resembles. Others may belong to other
    programs."""
    if not variable.startswith("HISVD_") or variable in _OTHER_VARIABLES:
        return None
    return next(iter(difflib.get_close_matches(variable, known, n=1, cutoff=0.75)), None)


def from_overrides(overrides: Sequence[str], problems: Problems) -> Iterator[tuple[Key, Any, str]]:
    """Yield the settings of ``section.key=value`` texts."""
    for text in overrides:
        name, equals, value = text.partition("=")
        section, _, key = name.strip().partition(".")
        if not equals or section not in SECTIONS or key not in SECTIONS[section].model_fields:
            known = [f"{s}.{k}" for s, model in SECTIONS.items() for k in model.model_fields]
            reason = suggest(name.strip(), known) if equals else "Write section.key=value."
            problems.append((("--set", name), f"--set {text}: no such setting. {reason}"))
            continue
        yield (section, key), _override(value.strip(), section, key), f"--set {section}.{key}"


def _override(text: str, section: str, key: str) -> Any:
    """Return a value parsed as TOML, or unchanged if it is not valid TOML, such as a bare name."""
    try:
        value = tomli.loads(f"value = {text}")["value"]
        check_depth(value)
    except (ValueError, RecursionError):
        return text
    return text if kind_of(section, key) is str and not isinstance(value, str) else value
