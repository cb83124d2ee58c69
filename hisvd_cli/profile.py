"""Settings from flags, environment and ``hisvd.toml``: flag > environment > profile > default."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hisvd_cli.errors import UsageError, suggest
from hisvd_cli.settings import SECTIONS, Settings, flag_of

PROFILE_NAME = "hisvd.toml"
Key = tuple[str, str]


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each came from (``default`` where nothing set it)."""

    settings: Settings
    origins: dict[Key, str]

    def toml(self) -> str:
        """Return the settings as a profile, each line with its origin as a comment."""
        lines: list[str] = []
        for section, model in SECTIONS.items():
            lines.append(f"[{section}]")
            values = getattr(self.settings, section)
            for key in model.model_fields:
                value = getattr(values, key)
                origin = self.origins.get((section, key), "default")
                if value is None:  # TOML has no null: an unset key is shown as a comment
                    lines.append(f"# {key} is unset")
                else:
                    lines.append(f"{tomli_w.dumps({key: value}, indent=0).strip()}  # {origin}")
            lines.append("")
        return "\n".join(_one_line_lists(lines))

    def recorded(self) -> dict[str, Any]:
        """Return what artifacts record: every setting that can change a result."""
        document = self.settings.model_dump(mode="json")
        for key in ("path", "batch"):
            document["calibration"].pop(key)
        for section in ("eval",):
            document.pop(section)
        document["compress"].pop("evaluate")
        return document


def _one_line_lists(lines: list[str]) -> list[str]:
    return [" ".join(part.strip() for part in line.splitlines()) for line in lines]


def resolve(
    flags: Mapping[Key, Any],
    profile: Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    start: Path | None = None,
) -> Resolved:
    """Merge all layers and validate them together.

    Args:
        flags: (section, key) → value, None where the flag was not given.
        profile: the profile to read; None searches upward from ``start`` for ``hisvd.toml``.
        overrides: ``section.key=value`` texts, as strong as flags.
        environ: the environment; ``os.environ`` by default.
        start: where the search begins; the current folder by default.

    Raises:
        UsageError: one line for every unknown key, wrong type and value out of bounds.
    """
    path = profile or find_profile(start or Path.cwd())
    document = read_profile(path) if path else {}
    problems = _profile_problems(document, path)
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins: dict[Key, str] = {}
    layers = [
        *((key, value, str(path)) for key, value in _flatten(document)),
        *_from_environment(os.environ if environ is None else environ, problems),
        *((key, v, flag_of(*key)) for key, v in flags.items() if v is not None),
        *_from_overrides(overrides, problems),
    ]
    for (section, key), value, origin in layers:
        merged[section][key] = value
        origins[section, key] = origin
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        told = {problem.partition(":")[0] for problem in problems}
        found = [_describe(detail, origins) for detail in error.errors()]
        problems += [p for p in found if p.partition(":")[0] not in told]
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)), "See every setting: --show-profile")
    return Resolved(settings, origins)


def find_profile(start: Path) -> Path | None:
    """Return the nearest ``hisvd.toml`` in ``start`` or above it."""
    for folder in (start, *start.parents):
        if (folder / PROFILE_NAME).is_file():
            return folder / PROFILE_NAME
    return None


def read_profile(path: Path) -> dict[str, Any]:
    """Parse a profile. Raises UsageError where it is missing or no TOML."""
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"Cannot read the profile {path}: {error.strerror}.", "Check the path."
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}.", "Mend that line.") from error


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    for section, values in document.items():
        if section in SECTIONS and isinstance(values, dict):
            for key, value in values.items():
                if key in SECTIONS[section].model_fields:
                    yield (section, key), value


def _profile_problems(document: Mapping[str, Any], path: Path | None) -> list[str]:
    """Validate a profile by itself, and strictly: "0.6" in quotes is a text, not a number."""
    try:
        Settings.model_validate(document, strict=True)
    except ValidationError as error:
        origins = {key: str(path) for key, _ in _flatten(document)}
        return [_describe(detail, origins, str(path)) for detail in error.errors()]
    return []


def _from_environment(
    environ: Mapping[str, str], problems: list[str]
) -> Iterator[tuple[Key, Any, str]]:
    for variable, text in sorted(environ.items()):
        prefix, _, rest = variable.partition("_")
        section, _, key = rest.lower().partition("_")
        if prefix != "HISVD" or section not in SECTIONS or not key:
            continue
        fields = SECTIONS[section].model_fields
        if key not in fields:
            known = (f"HISVD_{section.upper()}_{k.upper()}" for k in fields)
            problems.append(f"{variable}: no such setting. {suggest(variable, known)}")
            continue
        many = isinstance(fields[key].default, list)
        value = [part.strip() for part in text.split(",")] if many else text
        yield (section, key), value, variable


def _from_overrides(
    overrides: Sequence[str], problems: list[str]
) -> Iterator[tuple[Key, Any, str]]:
    for text in overrides:
        name, equals, value = text.partition("=")
        section, _, key = name.strip().partition(".")
        if not equals or section not in SECTIONS or key not in SECTIONS[section].model_fields:
            known = [f"{s}.{k}" for s, model in SECTIONS.items() for k in model.model_fields]
            problems.append(f"--set {text}: no such setting. {suggest(name.strip(), known)}")
            continue
        yield (section, key), _toml_value(value.strip()), f"--set {section}.{key}"


def _toml_value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _describe(detail: ErrorDetails, origins: Mapping[Key, str], where: str = "") -> str:
    """Turn one of pydantic's findings into a line: which setting, from where, what is wrong."""
    parts = [str(part) for part in detail["loc"]]
    name = ".".join(part for part in parts if not part.isdigit())
    if detail["type"] == "extra_forbidden":
        known = SECTIONS[parts[0]].model_fields if len(parts) > 1 else SECTIONS
        return f"{name}: unknown key in {where}. {suggest(parts[-1], known)}"
    origin = origins.get((parts[0], parts[1]) if len(parts) > 1 else ("", ""), where)
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{name}: {detail['input']!r} from {origin}: {message}"
