"""``--help`` shows the common options, ``--help-all`` all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from hisvd_cli.pipelines.config.settings import is_basic

_ALL = "hisvd.all_options"
_RARE = {
    *("overrides", "show_profile", "quiet", "verbose"),
    *("tables", "spectrum_of", "list_profiles", "check_values"),
}
"""Options that are not settings and are shown by ``--help-all`` only."""
_RARE_HERE = {
    "plan": {"plan__include", "model__max_memory"},
    "compress": {
        *("plan__allocator", "plan__include", "compress__evaluate", "calibration__path"),
        "eval__windows",
    },
}
"""Command → settings that its ``--help-all`` shows only, though other commands show them always."""


def without_metavars(params: list[Any]) -> list[Any]:
    """Return parameters; options that take no value show none in the help."""
    for option in params:
        if isinstance(option, TyperOption) and option.is_flag and option.metavar is None:
            option.metavar = ""
    return params


class BriefHelp(TyperCommand):
    """A command whose ``--help`` omits rare options."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with that of ``--help``."""
        return without_metavars(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with all options for ``--help-all``."""
        if ctx.meta.get(_ALL):
            super().format_help(ctx, formatter)
            return
        count = sum(p.param_type_name == "option" for p in self.get_params(ctx))
        with self._brief(f"All {count} options: {ctx.command_path} --help-all"):
            super().format_help(ctx, formatter)

    @contextmanager
    def _brief(self, epilog: str) -> Iterator[None]:
        """Hide rare options in the body; completion still offers them."""
        rare = [p for p in self.params if isinstance(p, TyperOption) and self._is_rare(str(p.name))]
        self.epilog = epilog
        for option in rare:
            option.hidden = True
        try:
            yield
        finally:
            self.epilog = None
            for option in rare:
                option.hidden = False

    def _is_rare(self, name: str) -> bool:
        section, _, key = name.partition("__")
        if name in _RARE_HERE.get(str(self.name), ()):
            return True
        return not is_basic(section, key) if key else name in _RARE


def show_all(ctx: typer.Context, wanted: bool) -> None:
    """Print the help of all options and exit: the callback of ``--help-all``."""
    if wanted:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help(), color=ctx.color)
        raise typer.Exit
