"""Validated settings and their origins."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tomli_w

from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.settings import SECTIONS, Settings, decides, flag_of

PRESET: Key = ("plan", "preset")
BY_PRESET = "preset "


@dataclass(frozen=True)
class Resolved:
    """Settings and their origins.

    Attributes:
        settings: the validated settings.
        origins: (section, key) → a flag, an environment variable, the path of a profile, or
            ``preset NAME``; no entry for defaults.
        profile: the profile that the user named, if any.
        in_use: path of the profile that was read, named or found, if any.
        foreign: path of a profile that was not read because another user owns it.
        variants: the settings with each preset, if several are given; ``settings`` itself contains
            none of their settings.
        by_ratio: the settings at each ratio, if the preset differs between them; ``settings``
            itself contains those that all ratios share.
    """

    settings: Settings
    origins: dict[Key, str]
    profile: str | None = None
    in_use: str | None = None
    foreign: str | None = None
    variants: tuple[Resolved, ...] = ()
    by_ratio: Mapping[float, Resolved] = field(default_factory=dict)

    def cells(self) -> list[Resolved]:
        """Return the settings of each preset at each ratio, as if given alone."""
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
        """Return whether a setting was given on the command line."""
        return self.origins.get((section, key), "").startswith("--")

    def asked(self, section: str) -> list[str]:
        """Return the settings of a section that affect the result and have an explicit value."""
        given = [key for of, key in self.origins if of == section and decides(of, key)]
        return [key for key in given if self.value(section, key) not in (None, "auto")]

    def place(self, section: str, key: str) -> str:
        """Return the origin of a setting for a message: its flag, its environment variable, or its
        key and the profile."""
        origin = self.origins[section, key]
        return origin if origin.startswith(("--", "HISVD_")) else f"{section}.{key} in {origin}"

    def uses_defaults(self, section: str) -> bool:
        """Return whether neither a preset nor an allocator was chosen."""
        return not {(section, "preset"), (section, "allocator")} & self.origins.keys()

    def flags(self, *sections: str, without: Collection[Key] = (), expanded: bool = False) -> str:
        """Return the flags of ``sections`` that were given, as text to paste; with ``model``, also
        the named profile.

        Args:
            sections: sections of the settings.
            without: settings to omit.
            expanded: include the settings of a preset that was given as a flag.
        """
        by_preset = expanded and self.is_flag(*PRESET)
        words = ["--profile", self.profile] if self.profile and "model" in sections else []
        for (section, key), origin in self.origins.items():
            given = origin.startswith(("--", BY_PRESET) if by_preset else "--")
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
                # TOML has no null: an unset key becomes a comment.
                setting = f"# {key} is unset" if value is None else f"{key} = {toml_text(value)}"
                lines.append(f"{setting}  # {origin}")
            lines.append("")
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """Return the settings and their origins as JSON data."""
        origins = {f"{section}.{key}": origin for (section, key), origin in self.origins.items()}
        settings = self.settings.model_dump(mode="json")
        return {"profile": self.in_use, "settings": settings, "origins": origins}

    def recorded(self, *sections: str) -> dict[str, Any]:
        """Return the settings that artifacts record: those of ``sections`` (default: all but
        ``eval``) that affect the result."""
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


def toml_text(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(toml_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml_text(item)}' for key, item in value.items())}}}"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
