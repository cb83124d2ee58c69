"""Flags made from the settings, so that a setting is written down once."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from hisvd_cli.console import Console
from hisvd_cli.profile import Key, Resolved, resolve
from hisvd_cli.settings import SECTIONS, Settings, flag_of


@dataclass(frozen=True)
class Run:
    """What every command gets: settings, where they came from, and where to print."""

    resolved: Resolved
    console: Console

    @property
    def settings(self) -> Settings:
        """The validated settings."""
        return self.resolved.settings


CALIBRATION_KEYS: list[Key] = [
    *(("model", key) for key in SECTIONS["model"].model_fields),
    *(("calibration", key) for key in SECTIONS["calibration"].model_fields),
]
PLAN_KEYS: list[Key] = [("plan", key) for key in SECTIONS["plan"].model_fields]
COMPRESS_KEYS: list[Key] = [("compress", key) for key in SECTIONS["compress"].model_fields]
MODEL_KEYS: list[Key] = [("model", key) for key in SECTIONS["model"].model_fields]
EVAL_KEYS: list[Key] = [("eval", key) for key in SECTIONS["eval"].model_fields]

_COMMON: dict[str, Any] = {
    "profile": Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="Profile to read (default: the nearest hisvd.toml upward from here).",
            metavar="FILE",
            rich_help_panel="Settings and output",
        ),
    ],
    "overrides": Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any setting: section.key=value.",
            metavar="KEY=VALUE",
            rich_help_panel="Settings and output",
        ),
    ],
    "show_profile": Annotated[
        bool,
        typer.Option(
            "--show-profile",
            help="Print the resolved settings as TOML, each with its origin, and stop.",
            rich_help_panel="Settings and output",
        ),
    ],
    "as_json": Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON document on stdout, nothing else there.",
            rich_help_panel="Settings and output",
        ),
    ],
    "quiet": Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Only the result's line, and errors.",
            rich_help_panel="Settings and output",
        ),
    ],
    "verbose": Annotated[
        bool,
        typer.Option("--verbose", "-v", help="More notes.", rich_help_panel="Settings and output"),
    ],
}


def with_settings(keys: Iterable[Key]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command the flags of ``keys`` and the common ones.

    The command is called with a :class:`Run` and its own parameters.
    """
    names = {f"{section}__{key}": (section, key) for section, key in keys}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            flags = {
                key: given.pop(name) or None if name == "model__name" else given.pop(name)
                for name, key in names.items()
            }
            common = {name: given.pop(name) for name in _COMMON}
            console = Console(common["as_json"], common["quiet"], common["verbose"])
            flags = {key: list(v) if isinstance(v, tuple) else v for key, v in flags.items()}
            flags = {key: None if v == [] else v for key, v in flags.items()}
            resolved = resolve(flags, common["profile"], common["overrides"] or ())
            if common["show_profile"]:
                console.text(resolved.toml())
                return
            command(Run(resolved, console), **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = own + [_parameter(name, *key) for name, key in names.items()]
        parameters += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if _is_switch(annotation) else None,
                annotation=annotation,
            )
            for name, annotation in _COMMON.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _is_switch(annotation: Any) -> bool:
    return typing.get_args(annotation)[0] is bool


def _parameter(name: str, section: str, key: str) -> inspect.Parameter:
    field = SECTIONS[section].model_fields[key]
    default = field.default
    flag = flag_of(section, key)
    kind = _plain(field.annotation)
    shown = "" if default in (None, "", []) else f" (default {_shown(default)})"
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    option = typer.Option(
        *flags,
        help=f"{field.description}{shown}",
        show_default=False,
        rich_help_panel=section.capitalize(),
    )
    # Subscripted by hand: the type is known only here, so no annotation can be written down.
    annotation = Annotated.__class_getitem__((kind | None, option))  # type: ignore[attr-defined]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shown(default: Any) -> str:
    return ", ".join(map(str, default)) if isinstance(default, list) else str(default)


def _plain(annotation: Any) -> Any:
    """Return the type that the command line parses: bounds are checked once, with the profile."""
    if typing.get_origin(annotation) is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(_plain(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return list[_plain(typing.get_args(annotation)[0])]  # type: ignore[misc]
    return annotation
