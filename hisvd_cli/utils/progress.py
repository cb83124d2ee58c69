"""How the library reports its progress: to nobody, or on stderr."""

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

_LOG_SECONDS = 30.0  # between two lines on a stage where no progress bar can be drawn


class Reporter(Protocol):
    """What long work calls; the command line shows it, tests may collect it."""

    def stage(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a stage of ``total`` steps; the function it yields counts one step."""
        ...

    def note(self, message: str) -> None:
        """Tell something worth knowing."""
        ...

    def suggest(self, message: str) -> None:
        """Tell of something better that the user could do."""
        ...

    def warn(self, message: str) -> None:
        """Tell something that may change a result."""
        ...


class Silent:
    """A reporter that says nothing."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[], None]]:  # noqa: ARG002
        """Yield a function that does nothing."""
        yield lambda: None

    def note(self, message: str) -> None:
        """Say nothing."""

    def suggest(self, message: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Say nothing."""


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step where a step is long."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


class SafeConsole(RichConsole):
    """Rich's console, which lets no text reach the terminal as a control sequence.

    Nor does a name break the line that it stands in, and so forge another one: no text here holds
    a line break on purpose.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the pieces of what is printed: texts without control characters, and rich's own
        sequences."""
        if isinstance(renderable, str):
            renderable = renderable.replace("\n", " ")
        elif isinstance(renderable, Text) and "\n" in renderable.plain:
            renderable = renderable.copy()
            renderable.plain = renderable.plain.replace("\n", " ")  # styles stay at their places
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class StderrReporter:
    """Reports on stderr. No text is taken for markup, or printed with control characters.

    Args:
        quiet: neither progress nor hints.
        verbose: notes that are otherwise left out.
        muted: print nothing at all, as one of several processes that do the same.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, muted: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.muted = muted
        self._err = SafeConsole(stderr=True)

    def worded(self, message: str) -> str:
        """Return a message as it is shown; subclasses name the settings in it their own way."""
        return message

    def note(self, message: str) -> None:
        """Tell something worth knowing (--verbose)."""
        if self.verbose:
            self._tell(Text(self.worded(message), style="dim"))

    def warn(self, message: str) -> None:
        """Tell something that may change a result."""
        self._tell(Text.assemble(("Warning: ", "yellow"), self.worded(message)))

    def suggest(self, message: str) -> None:
        """Tell of something better that the user could do."""
        if not self.quiet:
            self._tell(Text.assemble(("Note: ", "dim"), self.worded(message)))

    def _tell(self, text: Text) -> None:
        # Lines are left to the terminal to break, so that a command in them can be copied.
        if not self.muted:
            self._err.print(text, soft_wrap=True)

    def stage(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Show progress through ``total`` steps; the function it yields counts one.

        A terminal gets a bar with rate and time left, a log file a line now and then.
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
        started = told = time.monotonic()
        done = 0

        def step() -> None:
            nonlocal done, told
            done += 1
            now = time.monotonic()
            if not self.quiet and (done == total or now - told >= _LOG_SECONDS):
                self._tell(Text(f"{label}: {done}/{total} in {now - started:.1f} s", style="dim"))
                told = now

        yield step
