"""Reads and validates profiles (``hisvd.toml``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.resolved import toml_text
from hisvd_cli.pipelines.config.settings import SECTIONS, Settings, consent_of
from hisvd_cli.pipelines.config.validation_errors import Problems, describe
from hisvd_cli.utils.errors import UsageError, suggest
from hisvd_cli.utils.files.json_files import check_depth, read_bounded

_MAX_BYTES = 1 << 20
SHIPPED = Path(__file__).parent / "profiles"
"""Folder of the shipped profiles."""
NO_CONSENT = "which requires a flag, an environment variable or `profile`."


def shipped_or_file(profile: Path) -> Path:
    """Return the file of a profile: an existing path, or the name of a shipped profile. Raises
    UsageError if it is neither."""
    if profile.exists() or profile.name != str(profile) or profile.suffix == ".toml":
        return profile
    known = {path.stem: path for path in SHIPPED.glob("*.toml")}
    if str(profile) not in known:
        raise UsageError(
            f"'{profile}' is neither a file nor a shipped profile.",
            suggest(str(profile), known),
        )
    return known[str(profile)]


def read_profile(path: Path) -> dict[str, Any]:
    """Parse a profile. Raises UsageError if it is missing or not valid TOML."""
    try:
        document = tomli.loads(read_bounded(path, _MAX_BYTES).decode("utf-8-sig"))
        check_depth(document)
        return document
    except OSError as error:
        raise UsageError(
            f"Cannot read the profile {path}: {error.strerror}.", "Check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deep" if deep else " ".join(str(error).split())
        raise UsageError(f"{path} is not valid TOML: {reason}.", "Fix that line.") from error


def flatten(document: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Yield the known settings of a profile."""
    for section, values in document.items():
        if section in SECTIONS and isinstance(values, dict):
            for key, value in values.items():
                if key in SECTIONS[section].model_fields:
                    yield (section, key), value


def profile_problems(document: Mapping[str, Any], profile: str) -> Problems:
    """Return the problems of a profile alone. Types are strict: "0.6" in quotes is not a number."""
    try:
        Settings.model_validate(document, strict=True)
    except ValidationError as error:
        return [describe(detail, {}, profile) for detail in error.errors()]
    return []


def without_consent(document: Mapping[str, Any], profile: str, known: Problems) -> Problems:
    """Return the settings that require consent, for a profile that the user did not name.

    Such a profile may come from an untrusted source. Defaults are allowed, so that the output of
    ``--show-profile`` is a valid profile.
    """
    reported = {key for key, _ in known}
    return [
        (
            (section, key),
            f"{profile}: {section}.{key} = {toml_text(value)} {consent_of(section, key)}, "
            f"{NO_CONSENT}",
        )
        for (section, key), value in flatten(document)
        if consent_of(section, key)
        and value != SECTIONS[section].model_fields[key].default
        and (section, key) not in reported
    ]
