"""Command-line options, generated from the settings."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

import typer
from rich.markup import escape

from hisvd_cli.cli.brief_help import show_all
from hisvd_cli.cli.console import Console
from hisvd_cli.pipelines.config.commands import SEVERAL, Key
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
    metavar_of,
    panel_of,
)
from hisvd_cli.utils.distributed import joining, launched, launched_rank, leave
from hisvd_cli.utils.files.scratch import sweep

if TYPE_CHECKING:
    from rich.console import RenderableType

Command = Callable[..., None]

_METAVARS = {int: "N", float: "X", str: "NAME", bool: ""}
"""Placeholders of values in ``--help``, short enough for 80 columns."""


@dataclass(frozen=True)
class Run:
    """The settings and the console of a command."""

    resolved: Resolved
    console: Console

    @property
    def settings(self) -> Settings:
        """The validated settings."""
        return self.resolved.settings

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return not self.console.muted

    def show_forecast(
        self, forecast: Mapping[str, Any], view: RenderableType, line: str = ""
    ) -> None:
        """Print the result of a dry run; by default its time in seconds with --quiet."""
        self.console.show(view)
        document = {"dry_run": True, **forecast}
        self.console.result(document, line or f"{forecast['seconds']:.0f} s")


def option(*flags: str, text: str, metavar: str = "", panel: str | None = None) -> Any:
    """Return an option of a command; without a ``metavar`` it takes no value. Typer reads help as
    markup, in which ``hisvd[eval]`` would lose its extra."""
    return typer.Option(
        *flags, help=escape(text), metavar=metavar, show_default=False, rich_help_panel=panel
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
    help_all: Annotated[  # noqa: ARG001 - handled by its callback
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
    """Define the common options of all commands; return them for :func:`with_settings`."""
    console = Console(as_json, quiet, verbose, muted=launched_rank() > 0)
    return console, profile, overrides or [], show_profile


def with_settings(keys: Iterable[Key], together: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of ``keys`` and the common ones to a command.

    The command is called with a :class:`Run` and its own parameters.

    Args:
        keys: (section, key) of settings.
        together: whether several processes run the command together; otherwise only the first
            process runs it.
    """
    settings = {f"{section}__{key}": (section, key) for section, key in keys}
    common = inspect.signature(_take_common, eval_str=True).parameters

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            # Typer passes an empty list for a repeatable option that is not given.
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
        # Panels are in the order of their first option: those of single methods come last.
        ordered = sorted(settings.items(), key=lambda item: bool(panel_of(*item[1])))
        shown = [*own, *(_parameter(command.__name__, name, *key) for name, key in ordered)]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*shown, *common.values()]]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _tell_profile(resolved: Resolved, console: Console) -> None:
    console.note(f"Profile: {resolved.in_use or 'none'}")
    if resolved.foreign:
        console.warn(
            f"{resolved.foreign} is ignored: the file or its folder belongs to another user. Pass "
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


def _parameter(command: str, name: str, section: str, key: str) -> inspect.Parameter:
    """Return the parameter that defines the option of one setting.

    Values are strings (or switches), which are parsed and validated together with all other sources
    of settings.
    """
    field = SECTIONS[section].model_fields[key]
    kind = kind_of(section, key)
    flag = flag_of(section, key)
    text = in_flags(str(field.description))
    taken: Any = str
    if kind is bool:
        taken = bool
        if field.default is not False:  # on or unset by default, so it can be switched off
            flag += f"/--no-{flag[2:]}"
    elif get_origin(kind) is list:
        taken = list[str]
        if command in SEVERAL.get((section, key), (command,)):
            text = text.removesuffix(".") + " (repeatable)."
    annotation = typer.Option(
        flag,
        help=escape(text + _default_text(field.default)),
        metavar=metavar_of(section, key) or _metavar(kind),
        show_default=False,
        rich_help_panel=panel_of(section, key) or _section_panel(section),
        autocompletion=_completer(section, key),
    )
    # Called directly, since the type is not known statically.
    annotated = Annotated.__class_getitem__((taken | None, annotation))  # type: ignore[attr-defined]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotated
    )


def _completer(section: str, key: str) -> Callable[[str], list[tuple[str, str]]] | None:
    """Return the completion of an option with known values: each match with a description."""
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
