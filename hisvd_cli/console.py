"""The only place that prints: results on stdout; progress, hints and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hisvd_cli.errors import HisvdError


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step where a step is long."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


class Console:
    """One output sink.

    Args:
        as_json: stdout gets one JSON document and nothing else.
        quiet: neither progress nor hints, and results in one line.
        verbose: notes that are otherwise left out.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self._out = RichConsole(highlight=False, soft_wrap=False)
        self._err = RichConsole(stderr=True, highlight=False)

    @property
    def width(self) -> int:
        """Columns of the terminal that results go to."""
        return self._out.width

    def show(self, renderable: RenderableType) -> None:
        """Print a table or text for a person; nothing with --json or --quiet."""
        if not (self.as_json or self.quiet):
            self._out.print(renderable)

    def result(self, document: dict[str, Any], line: str) -> None:
        """Print the result as JSON (--json), or as one plain line (--quiet)."""
        if self.as_json:
            json.dump(document, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
            sys.stdout.write("\n")
        elif self.quiet:
            sys.stdout.write(f"{line}\n")

    def text(self, text: str) -> None:
        """Print a text as it is on stdout."""
        sys.stdout.write(text)

    def note(self, message: str) -> None:
        """Tell something worth knowing (--verbose)."""
        if self.verbose:
            self._err.print(Text(message, style="dim"))

    def warn(self, message: str) -> None:
        """Tell something that may change a result."""
        self._err.print(Text.assemble(("Warning: ", "yellow"), message))

    def next_command(self, command: str) -> None:
        """End with what a user would run next."""
        if not (self.quiet or self.as_json):
            self._err.print(Text.assemble(("Next: ", "dim"), (command, "bold")), soft_wrap=True)

    def error(self, error: HisvdError) -> None:
        """Print an error: what is wrong, and what to do."""
        self._err.print(Text.assemble(("Error: ", "bold red"), error.message), soft_wrap=True)
        if error.hint:
            self._err.print(Text.assemble(("Hint: ", "cyan"), error.hint), soft_wrap=True)

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar with rate and time left; the yielded function counts one step."""
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=self._err,
            disable=self.quiet or not self._err.is_terminal,
        )
        with progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)
