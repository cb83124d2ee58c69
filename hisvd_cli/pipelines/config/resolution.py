"""Resolves settings: flags take precedence over the environment, the profile and defaults.

A preset has the precedence of its source, below the other settings of that source.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.overrides import from_environment, from_overrides
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.profile_file import (
    NO_CONSENT,
    flatten,
    profile_problems,
    read_profile,
    shipped_or_file,
    without_consent,
)
from hisvd_cli.pipelines.config.profile_search import Search, search_profile
from hisvd_cli.pipelines.config.resolved import BY_PRESET, PRESET, Resolved
from hisvd_cli.pipelines.config.settings import SECTIONS, Settings, flag_of
from hisvd_cli.pipelines.config.validation_errors import Problems, describe
from hisvd_cli.utils.errors import UsageError

_RATIO_HINT = "The ratio is the share to keep, above 0 and at most 1: 0.6 keeps 60 %."
_SETTINGS_HINT = "The command's --help-all lists its settings with their values and defaults."


def resolve(
    flags: Mapping[Key, Any],
    profile: Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    start: Path | None = None,
    search: bool = True,
) -> Resolved:
    """Merge and validate the settings of all sources.

    Args:
        flags: (section, key) → value, None if the flag was not given.
        profile: the profile to read, a file or the name of a shipped one; None searches ``start``
            and its parents for ``hisvd.toml``, if ``search``.
        overrides: ``section.key=value`` texts, with the precedence of flags.
        environ: the environment; default ``os.environ``.
        start: the folder where the search starts; default the current folder.
        search: whether to search for a profile if none is named.

    Raises:
        UsageError: one line for each unknown key, wrong type and value out of bounds.
    """
    searched = Search() if profile or not search else search_profile(start or Path.cwd())
    path = shipped_or_file(profile) if profile else searched.profile
    document = read_profile(path) if path else {}
    problems = profile_problems(document, str(path))
    if not profile:
        problems += without_consent(document, str(path), problems)
    layers: list[_Layer] = [
        [(key, value, str(path)) for key, value in flatten(document)],
        list(from_environment(os.environ if environ is None else environ, problems)),
        [
            *((key, v, flag_of(*key)) for key, v in flags.items() if v is not None),
            *from_overrides(overrides, problems),
        ],
    ]
    named = str(profile) if profile else None
    base = _at_ratios(layers, str(path), problems, named)
    base = replace(base, in_use=str(path) if path else None)
    base = replace(base, foreign=str(searched.foreign) if searched.foreign else None)
    several = base.settings.plan.preset
    if len(several) < 2:
        return base
    narrowed = (_narrowed(layers, name) for name in several)
    variants = (_at_ratios(each, str(path), [], named) for each in narrowed)
    return replace(base, variants=tuple(variants))


_Layer = list[tuple[Key, Any, str]]
"""The settings of one source, each with its origin; later ones take precedence."""


def _at_ratios(
    layers: Sequence[_Layer], profile: str, problems: Problems, named: str | None
) -> Resolved:
    """Merge layers, with the settings of the preset at each ratio. Raises UsageError."""
    base = Resolved(*_merged(layers, profile, problems), named)
    ratios, presets = dict.fromkeys(base.settings.plan.ratio), base.settings.plan.preset
    if len(presets) != 1 or all(ratio >= PRESETS[presets[0]].low_ratio for ratio in ratios):
        return base
    each = {r: Resolved(*_merged(layers, profile, [], r), named) for r in ratios}
    return replace(base, by_ratio=each) if len(each) > 1 else next(iter(each.values()))


def _merged(
    layers: Sequence[_Layer], profile: str, problems: Problems, ratio: float | None = None
) -> tuple[Settings, dict[Key, str]]:
    """Merge layers, weakest first; return the settings and their origins. Raises UsageError.

    Args:
        layers: the settings of each source.
        profile: path of the profile.
        problems: the problems found so far.
        ratio: the keep ratio for the settings of a preset.
    """
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins: dict[Key, str] = {}
    for (section, key), value, origin in _with_preset(layers, ratio):
        merged[section][key] = value
        origins[section, key] = origin
    settings = _validate(merged, origins, profile, problems)
    if settings is None:
        lines = dict.fromkeys(line for _, line in problems)
        raise UsageError("\n".join(lines), _hint(problems, profile))
    return settings, origins


def _hint(problems: Problems, profile: str) -> str:
    """Return the hint for all problems."""
    if all(line.endswith(NO_CONSENT) for _, line in problems):
        return f"Use a flag, or `profile={shlex.quote(profile)}` if you trust all its settings."
    ratio_only = all(key[1] in ("ratio", "bytes_ratio") for key, _ in problems)
    return _RATIO_HINT if ratio_only else _SETTINGS_HINT


def _with_preset(layers: Sequence[_Layer], ratio: float | None) -> Iterator[tuple[Key, Any, str]]:
    """Yield the settings of all layers, weakest first, with those of the strongest preset.

    Presets of weaker layers are ignored, so that presets are not mixed.
    """
    given = [_preset_of(layer) for layer in layers]
    chosen = max((i for i, names in enumerate(given) if names is not None), default=None)
    for i, layer in enumerate(layers):
        names = (given[i] if i == chosen else None) or []
        # Several presets are resolved separately; validation rejects unknown ones.
        if len(names) == 1 and names[0] in PRESETS:
            for key, value in flatten(PRESETS[names[0]].at(ratio)):
                yield key, value, f"{BY_PRESET}{names[0]}"
        yield from layer


def _narrowed(layers: Sequence[_Layer], preset: str) -> list[_Layer]:
    """Return layers with ``preset`` in place of the presets that they name."""
    return [
        [(key, [preset] if key == PRESET else value, origin) for key, value, origin in layer]
        for layer in layers
    ]


def _preset_of(layer: _Layer) -> list[str] | None:
    """Return the presets that a layer names; None if it does not set the preset."""
    value = {key: value for key, value, _ in layer}.get(PRESET)
    names = [value] if isinstance(value, str) else value
    return list(dict.fromkeys(map(str, names))) if isinstance(names, list) else None


def _validate(
    merged: Mapping[str, Any], origins: Mapping[Key, str], profile: str, problems: Problems
) -> Settings | None:
    """Return the settings, or None if there are problems; append those found here."""
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        reported = {key for key, _ in problems}
        found = [describe(detail, origins, profile) for detail in error.errors()]
        problems += [(key, line) for key, line in found if key not in reported]
        return None
    return None if problems else settings
