"""Progress reporters: silent, or on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from hisvd_cli.utils.escaping import printable

_LOG_SECONDS = 30.0  # between two log lines of a stage without a progress bar


class Reporter(Protocol):
    """Interface through which long operations report progress and messages."""

    def stage(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a stage of ``total`` steps; yields a function that counts one step."""
        ...

    def begin(self, work: str) -> None:
        """Report that slow work without steps begins."""
        ...

    def note(self, message: str) -> None:
        """Report additional information."""
        ...

    def suggest(self, message: str) -> None:
        """Suggest a better way to do the same."""
        ...

    def warn(self, message: str) -> None:
        """Report something that may change a result."""
        ...


class Silent:
    """A reporter that discards everything."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[], None]]:  # noqa: ARG002
        """Yield a function that does nothing."""
        yield lambda: None

    def begin(self, work: str) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def suggest(self, message: str) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        """Do nothing."""


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step if a step takes longer than a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


class SafeConsole(RichConsole):
    """A rich console that removes control sequences from text.

    Line breaks in text are replaced too, so that a name from a file cannot forge a second line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments to print: text without control characters, and rich's own control
        sequences."""
        if isinstance(renderable, str):
            renderable = renderable.replace("\n", " ")
        elif isinstance(renderable, Text) and "\n" in renderable.plain:
            renderable = renderable.copy()
            renderable.plain = renderable.plain.replace("\n", " ")  # keeps the styles in place
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class StderrReporter:
    """Reports on stderr. Text is not parsed as markup; control characters are removed.

    Args:
        quiet: hide progress and suggestions.
        verbose: show notes.
        muted: print nothing, for all but the first process of a distributed run.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, muted: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.muted = muted
        self._err = SafeConsole(stderr=True)

    def worded(self, message: str) -> str:
        """Return a message as it is shown; subclasses replace the names of settings."""
        return message

    def begin(self, work: str) -> None:
        """Print that slow work begins, unless quiet."""
        if not self.quiet:
            self._tell(Text(f"{work} …", style="dim"))

    def note(self, message: str) -> None:
        """Print additional information, if verbose."""
        if self.verbose:
            self._tell(Text(self.worded(message), style="dim"))

    def warn(self, message: str) -> None:
        """Print something that may change a result."""
        self._tell(Text.assemble(("Warning: ", "yellow"), self.worded(message)))

    def suggest(self, message: str) -> None:
        """Print a suggestion, unless quiet."""
        if not self.quiet:
            self._tell(Text.assemble(("Note: ", "dim"), self.worded(message)))

    def _tell(self, text: Text) -> None:
        # The terminal wraps lines, so that a command in a message can be copied.
        if not self.muted:
            self._err.print(text, soft_wrap=True)

    def stage(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Show progress through ``total`` steps; yields a function that counts one step.

        On a terminal: a bar with rate and remaining time; elsewhere: a line every 30 seconds.
        """
        drawn = self._err.is_terminal and not (self.quiet or self.muted)
        draw = self._bar if drawn else self._log
        return draw(label, total)

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=18)),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._err,
        )
        with progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)

    @contextmanager
    def _log(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        started = printed = time.monotonic()
        done = 0

        def step() -> None:
            nonlocal done, printed
            done += 1
            now = time.monotonic()
            if not self.quiet and (done == total or now - printed >= _LOG_SECONDS):
                self._tell(Text(f"{label}: {done}/{total} in {now - started:.1f} s", style="dim"))
                printed = now

        yield step
