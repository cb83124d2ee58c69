"""Flags made from the settings, so that a setting is written down once."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from hisvd_cli.cli.brief_help import show_all
from hisvd_cli.cli.console import Console
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.mentions import in_flags
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import (
    SECTIONS,
    Settings,
    choices_of,
    flag_of,
    item_of,
    kind_of,
    panel_of,
)
from hisvd_cli.utils.distributed import joining, launched, launched_rank, leave
from hisvd_cli.utils.files.scratch import sweep

Command = Callable[..., None]

_METAVARS = {int: "N", float: "X", str: "NAME", bool: ""}
"""What stands behind a flag in ``--help``, short so that an 80-column terminal shows all flags."""


@dataclass(frozen=True)
class Run:
    """What every command gets: settings, where they came from, and where to print."""

    resolved: Resolved
    console: Console

    @property
    def settings(self) -> Settings:
        """The validated settings."""
        return self.resolved.settings

    @property
    def first(self) -> bool:
        """Whether this is the one process, or of several the one that writes."""
        return not self.console.muted


def option(*flags: str, text: str, metavar: str = "", panel: str | None = None) -> Any:
    """Return a flag of a command; without a ``metavar`` it takes no value."""
    return typer.Option(
        *flags, help=text, metavar=metavar, show_default=False, rich_help_panel=panel
    )


DryRun = Annotated[
    bool, option("--dry-run", text="Print sizes, memory and time without doing the work.")
]


def _common(*flags: str, text: str, metavar: str = "") -> Any:
    return option(*flags, text=text, metavar=metavar, panel="Settings and output")


def _take_common(
    profile: Annotated[
        Path | None,
        _common(
            "--profile",
            text="Profile: a file, or the name of a shipped one (plan --list-profiles); default: "
            "the nearest hisvd.toml between here and the home folder. Paths in it are relative to "
            "the current folder.",
            metavar="FILE",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        _common(
            "--set",
            text="Any setting: section.key=value (repeatable). As an environment variable: "
            "HISVD_SECTION_KEY.",
            metavar="SETTING",
        ),
    ] = None,
    show_profile: Annotated[
        bool,
        _common(
            "--show-profile",
            text="Print the resolved settings as TOML with the origin of each, and exit.",
        ),
    ] = False,
    as_json: Annotated[bool, _common("--json", text="Print one JSON document to stdout.")] = False,
    quiet: Annotated[
        bool, _common("--quiet", "-q", text="Print only the result, warnings and errors.")
    ] = False,
    verbose: Annotated[
        bool, _common("--verbose", "-v", text="Show more notes, and warnings of libraries.")
    ] = False,
    help_all: Annotated[  # noqa: ARG001 - its callback does all
        bool,
        typer.Option(
            "--help-all",
            help="Show all options and exit.",
            metavar="",
            show_default=False,
            callback=show_all,
            is_eager=True,
        ),
    ] = False,
) -> tuple[Console, Path | None, list[str], bool]:
    """The flags of every command; returns them as :func:`with_settings` uses them."""
    console = Console(as_json, quiet, verbose, muted=launched_rank() > 0)
    return console, profile, overrides or [], show_profile


def with_settings(keys: Iterable[Key], together: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the flags of ``keys`` and the common ones.

    The command is called with a :class:`Run` and its own parameters.

    Args:
        keys: (section, key) of settings.
        together: several processes run the command as one; else the first does it alone.
    """
    settings = {f"{section}__{key}": (section, key) for section, key in keys}
    common = inspect.signature(_take_common, eval_str=True).parameters

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            # Typer gives an empty list for a repeatable flag that was not given.
            flags = {key: given.pop(name) for name, key in settings.items()}
            flags = {key: None if value == [] else value for key, value in flags.items()}
            console, profile, overrides, show = _take_common(**{n: given.pop(n) for n in common})
            resolved = resolve(flags, profile, overrides)
            _tell_profile(resolved, console)
            if show:
                _show_settings(resolved, console)
                return
            if not console.muted:
                sweep(resolved.settings.model.scratch)
            _prepare_libraries(console)
            work = partial(command, Run(resolved, console), **given)
            with console.alone():
                if together:
                    with joining(resolved.settings.model.device, Console().error):
                        if launched():
                            _share_measurements(resolved.settings.model.device)
                        work()
                elif not console.muted:
                    work()
            leave()

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        # Panels stand in the order of their first flag: what one method reads comes after the rest.
        ordered = sorted(settings.items(), key=lambda item: bool(panel_of(*item[1])))
        shown = [*own, *(_parameter(name, *key) for name, key in ordered)]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*shown, *common.values()]]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _tell_profile(resolved: Resolved, console: Console) -> None:
    console.note(f"Profile: {resolved.in_use or 'none'}")
    if resolved.foreign:
        console.warn(
            f"{resolved.foreign} is not read: it, or its folder, belongs to another user. Pass "
            f"--profile {shlex.quote(resolved.foreign)} if you trust it."
        )


def _show_settings(resolved: Resolved, console: Console) -> None:
    if console.as_json:
        console.result(resolved.document(), "")
    else:
        console.text(resolved.toml())


def _share_measurements(device: str) -> None:
    from hisvd_cli.utils.device import pick_device
    from hisvd_cli.utils.dtype_speed import share_measurements

    share_measurements(pick_device(device))


def _prepare_libraries(console: Console) -> None:
    from hisvd_cli.cli.libraries import calm_libraries

    calm_libraries(console.quiet or console.muted, console.verbose and not console.muted)


def _parameter(name: str, section: str, key: str) -> inspect.Parameter:
    """Return the parameter, and so the flag, of one setting.

    It takes texts (or is a switch): all layers of settings are parsed and checked in one place.
    """
    field = SECTIONS[section].model_fields[key]
    kind = kind_of(section, key)
    flag = flag_of(section, key)
    text = in_flags(str(field.description))
    taken: Any = str
    if kind is bool:
        taken = bool
        if field.default is not False:
            flag += f"/--no-{flag[2:]}"
    elif get_origin(kind) is list:
        taken = list[str]
        text = text.removesuffix(".") + " (repeatable)."
    annotation = typer.Option(
        flag,
        help=text + _default_text(field.default),
        metavar=_metavar(kind),
        show_default=False,
        rich_help_panel=panel_of(section, key) or _section_panel(section),
        autocompletion=_completer(section, key),
    )
    # Subscripted by hand: the type is known only here, so no annotation can be written down.
    annotated = Annotated.__class_getitem__((taken | None, annotation))  # type: ignore[attr-defined]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotated
    )


def _completer(section: str, key: str) -> Callable[[str], list[tuple[str, str]]] | None:
    """Return what completes the value of a flag that takes one of a few words: each that fits,
    with what a shell may show beside it."""
    words = choices_of(section, key)
    if not words:
        return None
    notes = {name: preset.about for name, preset in PRESETS.items()} if key == "preset" else {}
    return lambda incomplete: [
        (word, notes.get(word, "")) for word in words if word.startswith(incomplete)
    ]


def _section_panel(section: str) -> str:
    named = {"eval": "Evaluation", "quantize": "Quantization", "recover": "Recovery"}
    return named.get(section, section.capitalize())


def _metavar(kind: Any) -> str:
    item = item_of(kind)
    return "NAME" if get_origin(item) is Literal else _METAVARS.get(item, "VALUE")


def _default_text(default: Any) -> str:
    if default in (None, "", []):
        return ""
    if isinstance(default, bool):
        return f" (default {'on' if default else 'off'})"
    values = default if isinstance(default, list) else [default]
    return f" (default {', '.join(map(str, values))})"
