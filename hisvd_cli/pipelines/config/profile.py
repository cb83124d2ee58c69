"""Settings from flags, environment and ``hisvd.toml``: flag > environment > profile > default.

A preset ranks where it was given: below what else is set there, above all that is weaker.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hisvd_cli.modeling.pickles.records import clean
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.profile_search import Search, search_profile
from hisvd_cli.pipelines.config.settings import (
    SECTIONS,
    Settings,
    consent_of,
    decides,
    flag_of,
    item_of,
    kind_of,
)
from hisvd_cli.utils.errors import UsageError, suggest
from hisvd_cli.utils.files.json_files import check_depth, read_bounded

_MAX_BYTES = 1 << 20

SHIPPED = Path(__file__).parent / "profiles"
"""Where the profiles lie that hisvd brings."""
Key = tuple[str, str]

_PRESET: Key = ("plan", "preset")
_BY_PRESET = "preset "
_OTHER_VARIABLES = {"HISVD_CACHE", "HISVD_DEBUG"}
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_RATIO_HINT = "The ratio is the share to keep, above 0 and at most 1: 0.6 keeps 60 %."
_SETTINGS_HINT = "The --help of the command lists its settings, their values and defaults."
_UNASKED = "which only a flag, the environment or --profile may ask for."


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each came from (no entry: a default).

    Attributes:
        settings: the validated settings.
        origins: (section, key) → a flag, an environment variable, the path of a profile, or
            ``preset NAME`` where a preset brought it.
        profile: the profile that was asked for, None where it was only found.
        in_use: path of the profile that was read, asked for or found; None where there is none.
        foreign: path of a profile that was not read because it is another user's.
        variants: the same with each of several presets; none where at most one was given. Several
            bring nothing to ``settings`` itself.
        by_ratio: the same at each of several ratios, where the preset says more at some of them;
            ``settings`` itself is what all share.
    """

    settings: Settings
    origins: dict[Key, str]
    profile: str | None = None
    in_use: str | None = None
    foreign: str | None = None
    variants: tuple[Resolved, ...] = ()
    by_ratio: Mapping[float, Resolved] = field(default_factory=dict)

    def cells(self) -> list[Resolved]:
        """Return the settings of each preset at each ratio: as if given with these alone."""
        return [
            each.by_ratio.get(ratio, each)._at(ratio)
            for each in self.variants or (self,)
            for ratio in dict.fromkeys(self.settings.plan.ratio)
        ]

    def _at(self, ratio: float) -> Resolved:
        plan = self.settings.plan.model_copy(update={"ratio": [ratio]})
        return replace(self, settings=self.settings.model_copy(update={"plan": plan}))

    def value(self, section: str, key: str) -> Any:
        """Return one setting."""
        return getattr(getattr(self.settings, section), key)

    def is_flag(self, section: str, key: str) -> bool:
        """Tell whether a setting was given on the command line."""
        return self.origins.get((section, key), "").startswith("--")

    def asked(self, section: str) -> list[str]:
        """Return the settings of a section, of those that decide what comes out, that were given
        a value anywhere."""
        given = [key for of, key in self.origins if of == section and decides(of, key)]
        return [key for key in given if self.value(section, key) not in (None, "auto")]

    def place(self, section: str, key: str) -> str:
        """Return where a setting was given, to be named in a message: its flag, its environment
        variable, or its key and the profile."""
        origin = self.origins[section, key]
        return origin if origin.startswith(("--", "HISVD_")) else f"{section}.{key} in {origin}"

    def uses_defaults(self, section: str) -> bool:
        """Tell whether nothing chose a method: no preset, and no method by its name."""
        return not {(section, "preset"), (section, "allocator")} & self.origins.keys()

    def flags(self, *sections: str, without: Collection[Key] = (), expanded: bool = False) -> str:
        """Return the settings of ``sections`` that were given as flags, as text to paste; with the
        model's, the profile that was asked for.

        Args:
            sections: where to look.
            without: settings to leave out.
            expanded: take what ``--preset`` brought for flags as well.
        """
        by_preset = expanded and self.is_flag(*_PRESET)
        words = ["--profile", self.profile] if self.profile and "model" in sections else []
        for (section, key), origin in self.origins.items():
            given = origin.startswith(("--", _BY_PRESET) if by_preset else "--")
            if section in sections and given and (section, key) not in without:
                words += _as_flag(section, key, self.value(section, key))
        return shlex.join(words)

    def toml(self) -> str:
        """Return the settings as a profile, each line with its origin as a comment."""
        lines = [f"# profile: {' '.join((self.in_use or 'none').splitlines())}", ""]
        for section, values in self.settings.model_dump(mode="json").items():
            lines.append(f"[{section}]")
            for key, value in values.items():
                origin = " ".join(self.origins.get((section, key), "default").splitlines())
                # TOML has no null: an unset key is shown as a comment.
                setting = f"# {key} is unset" if value is None else f"{key} = {_toml(value)}"
                lines.append(f"{setting}  # {origin}")
            lines.append("")
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """Return the settings and their origins as JSON data."""
        origins = {f"{section}.{key}": origin for (section, key), origin in self.origins.items()}
        settings = self.settings.model_dump(mode="json")
        return {"profile": self.in_use, "settings": settings, "origins": origins}

    def recorded(self, *sections: str) -> dict[str, Any]:
        """Return what artifacts record of ``sections`` (all but ``eval`` where none is named):
        every setting that can change a result."""
        chosen = set(sections) or set(SECTIONS) - {"eval"}
        document = self.settings.model_dump(mode="json", include=chosen)
        for section, values in document.items():
            for key in [key for key in values if not decides(section, key)]:
                del values[key]
        if self.settings.compress.update == "none":
            for key in ("update", "update_damping"):
                document.get("compress", {}).pop(key, None)
        return document


def _as_flag(section: str, key: str, value: Any) -> list[str]:
    flag = flag_of(section, key)
    if value is True:
        return [flag]
    if value is False:
        return ["--set", f"{section}.{key}=false"]
    values = value if isinstance(value, list) else [value]
    return [word for v in values for word in (flag, str(v))]


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(item)}' for key, item in value.items())}}}"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


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
        profile: the profile to read, a file or the name of one that hisvd brings; None searches
            upward from ``start`` for ``hisvd.toml``.
        overrides: ``section.key=value`` texts, as strong as flags.
        environ: the environment; ``os.environ`` by default.
        start: where the search begins; the current folder by default.

    Raises:
        UsageError: one line for every unknown key, wrong type and value out of bounds.
    """
    searched = Search() if profile else search_profile(start or Path.cwd())
    path = shipped_or_file(profile) if profile else searched.profile
    document = read_profile(path) if path else {}
    problems = _profile_problems(document, str(path))
    if not profile:
        problems += _unasked(document, str(path), problems)
    layers: list[_Layer] = [
        [(key, value, str(path)) for key, value in _flatten(document)],
        list(_from_environment(os.environ if environ is None else environ, problems)),
        [
            *((key, v, flag_of(*key)) for key, v in flags.items() if v is not None),
            *_from_overrides(overrides, problems),
        ],
    ]
    asked = str(profile) if profile else None
    base = _at_ratios(layers, str(path), problems, asked)
    base = replace(base, in_use=str(path) if path else None)
    base = replace(base, foreign=str(searched.foreign) if searched.foreign else None)
    several = base.settings.plan.preset
    if len(several) < 2:
        return base
    narrowed = (_narrowed(layers, name) for name in several)
    variants = (_at_ratios(each, str(path), [], asked) for each in narrowed)
    return replace(base, variants=tuple(variants))


_Layer = list[tuple[Key, Any, str]]
"""Settings that were given in one place, each with its origin; a later one wins."""

_Problems = list[tuple[Key, str]]
"""What is wrong, a line each, with the setting that it is about."""


def _at_ratios(
    layers: Sequence[_Layer], profile: str, problems: _Problems, asked: str | None
) -> Resolved:
    """Merge layers, with what their preset says at their ratio, or at each. Raises UsageError."""
    base = Resolved(*_settled(layers, profile, problems), asked)
    ratios, presets = dict.fromkeys(base.settings.plan.ratio), base.settings.plan.preset
    if len(presets) != 1 or all(ratio >= PRESETS[presets[0]].low_ratio for ratio in ratios):
        return base
    each = {r: Resolved(*_settled(layers, profile, [], r), asked) for r in ratios}
    return replace(base, by_ratio=each) if len(each) > 1 else next(iter(each.values()))


def _settled(
    layers: Sequence[_Layer], profile: str, problems: _Problems, ratio: float | None = None
) -> tuple[Settings, dict[Key, str]]:
    """Merge layers, weakest first; return the settings and their origins. Raises UsageError.

    Args:
        layers: the settings that were given.
        profile: path of the profile.
        problems: what is wrong with them so far.
        ratio: the keep ratio at which a preset is asked for its settings.
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


def _hint(problems: _Problems, profile: str) -> str:
    """Say what to do about all problems together."""
    if all(line.endswith(_UNASKED) for _, line in problems):
        asked = shlex.quote(profile)
        return f"Give it as a flag, or pass --profile {asked} if you trust all that stands in it."
    ratio_only = all(key[1] in ("ratio", "bytes_ratio") for key, _ in problems)
    return _RATIO_HINT if ratio_only else _SETTINGS_HINT


def _with_preset(layers: Sequence[_Layer], ratio: float | None) -> Iterator[tuple[Key, Any, str]]:
    """Yield the settings of all layers, weakest first, with those of the preset that wins.

    A preset of a weaker layer brings nothing: of two combinations, no mixture is meant.
    """
    given = [_preset_of(layer) for layer in layers]
    chosen = max((i for i, names in enumerate(given) if names is not None), default=None)
    for i, layer in enumerate(layers):
        names = (given[i] if i == chosen else None) or []
        # Of several, each has settings of its own; an unknown one is refused by the validation.
        if len(names) == 1 and names[0] in PRESETS:
            for key, value in _flatten(PRESETS[names[0]].at(ratio)):
                yield key, value, f"{_BY_PRESET}{names[0]}"
        yield from layer


def _narrowed(layers: Sequence[_Layer], preset: str) -> list[_Layer]:
    """Return layers with one preset where they name any."""
    return [
        [(key, [preset] if key == _PRESET else value, origin) for key, value, origin in layer]
        for layer in layers
    ]


def _preset_of(layer: _Layer) -> list[str] | None:
    """Return the presets that a layer names; None where it says nothing of them."""
    value = {key: value for key, value, _ in layer}.get(_PRESET)
    names = [value] if isinstance(value, str) else value
    return list(dict.fromkeys(map(str, names))) if isinstance(names, list) else None


def _validate(
    merged: Mapping[str, Any], origins: Mapping[Key, str], profile: str, problems: _Problems
) -> Settings | None:
    """Return the settings, or None where there is a problem; add those found here."""
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        told = {key for key, _ in problems}
        found = [_describe(detail, origins, profile) for detail in error.errors()]
        problems += [(key, line) for key, line in found if key not in told]
        return None
    return None if problems else settings


def shipped_or_file(profile: Path) -> Path:
    """Return the file of a profile: a path that exists wins, then a bare name means one that hisvd
    brings. Raises UsageError for a name that is neither."""
    if profile.exists() or profile.name != str(profile) or profile.suffix == ".toml":
        return profile
    known = {path.stem: path for path in SHIPPED.glob("*.toml")}
    if str(profile) not in known:
        raise UsageError(
            f"No profile '{profile}': no such file, and none that hisvd brings.",
            suggest(str(profile), known),
        )
    return known[str(profile)]


def read_profile(path: Path) -> dict[str, Any]:
    """Parse a profile. Raises UsageError where it is missing or no TOML."""
    try:
        document = tomli.loads(read_bounded(path, _MAX_BYTES).decode("utf-8"))
        check_depth(document)
        return document
    except OSError as error:
        raise UsageError(
            f"Cannot read the profile {path}: {error.strerror}.", "Check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deep" if deep else " ".join(str(error).split())
        raise UsageError(f"{path} is no valid TOML: {reason}.", "Mend that line.") from error


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    for section, values in document.items():
        if section in SECTIONS and isinstance(values, dict):
            for key, value in values.items():
                if key in SECTIONS[section].model_fields:
                    yield (section, key), value


def _profile_problems(document: Mapping[str, Any], profile: str) -> _Problems:
    """Validate a profile by itself, and strictly: "0.6" in quotes is a text, not a number."""
    try:
        Settings.model_validate(document, strict=True)
    except ValidationError as error:
        return [_describe(detail, {}, profile) for detail in error.errors()]
    return []


def _unasked(document: Mapping[str, Any], profile: str, told: _Problems) -> _Problems:
    """Return what a profile that was only found may not set: what needs somebody's consent.

    Such a profile may lie in a folder that was fetched from anywhere. A default harms nobody, so
    that what ``--show-profile`` prints can be kept as a profile.
    """
    known = {key for key, _ in told}
    return [
        (
            (section, key),
            f"{profile}: {section}.{key} = {_toml(value)} {consent_of(section, key)}, {_UNASKED}",
        )
        for (section, key), value in _flatten(document)
        if consent_of(section, key)
        and value != SECTIONS[section].model_fields[key].default
        and (section, key) not in known
    ]


def _variable(section: str, key: str) -> str:
    return f"HISVD_{section}_{key}".upper()


def _from_environment(
    environ: Mapping[str, str], problems: _Problems
) -> Iterator[tuple[Key, Any, str]]:
    """Yield the settings of the environment. An empty variable counts as unset, and a list is
    written with commas."""
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
    """Return the setting that a misspelt variable means; one that resembles none may belong to
    another program."""
    if not variable.startswith("HISVD_") or variable in _OTHER_VARIABLES:
        return None
    return next(iter(difflib.get_close_matches(variable, known, n=1, cutoff=0.75)), None)


def _from_overrides(
    overrides: Sequence[str], problems: _Problems
) -> Iterator[tuple[Key, Any, str]]:
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
    """Read a value as TOML, or as it stands where it is none (a name needs no quotes)."""
    try:
        value = tomli.loads(f"value = {text}")["value"]
        check_depth(value)
    except (ValueError, RecursionError):
        return text
    return text if kind_of(section, key) is str and not isinstance(value, str) else value


def _describe(detail: ErrorDetails, origins: Mapping[Key, str], profile: str) -> tuple[Key, str]:
    """Turn one of pydantic's findings into a line: from where, which setting, what is wrong."""
    section, key = (*(str(part) for part in detail["loc"]), "")[:2]
    name = f"{section}.{key}" if key else section
    origin = origins.get((section, key), profile)
    if detail["type"] == "extra_forbidden":
        return (section, key), f"{profile}: {name}: no such setting. {_place(section, key)}"
    if origin == profile:
        line = f"{profile}: {name} = {clean(_toml(detail['input']))}"
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
        return f"is no table: write [{section}] above its keys."
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
