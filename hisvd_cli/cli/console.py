"""The only place that prints: results on stdout; progress, hints and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any

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

from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.escaping import printable

_UNBOUNDED = 500  # columns of a file or a pipe, which need no line breaks
_LOG_SECONDS = 30.0  # between two lines on a stage where no progress bar can be drawn


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step where a step is long."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


class _SafeConsole(RichConsole):
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


class Console:
    """One output sink. No text is taken for markup, or printed with control characters.

    Args:
        as_json: stdout gets one JSON document and nothing else.
        quiet: neither progress nor hints, and results in one line.
        verbose: notes that are otherwise left out.
        muted: print nothing at all, as one of several processes that do the same.
    """

    def __init__(
        self,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        muted: bool = False,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self.muted = muted
        self._stdout = sys.stdout
        bounded = self._stdout.isatty() or "COLUMNS" in os.environ
        self._out = _SafeConsole(file=self._stdout, width=None if bounded else _UNBOUNDED)
        self._err = _SafeConsole(stderr=True)

    @property
    def width(self) -> int:
        """Columns of the terminal that results go to."""
        return self._out.width

    def alone(self) -> AbstractContextManager[object]:
        """Keep stdout to this console while the body runs: what others print goes to stderr."""
        return redirect_stdout(sys.stderr)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or text for a person; nothing with --json or --quiet."""
        if not (self.as_json or self.quiet):
            with self._out.capture() as captured:
                self._out.print(renderable)
            self._write(captured.get())

    def result(self, document: dict[str, Any], line: str) -> None:
        """Print the result as JSON (--json), or as one plain line (--quiet)."""
        if self.as_json:
            self.text(json.dumps(document, indent=2, allow_nan=False) + "\n")
        elif self.quiet:
            self.text(f"{line}\n")

    def text(self, text: str) -> None:
        """Print a text as it is, but for control characters, on stdout. Raises BrokenPipeError
        where nobody reads it."""
        self._write(printable(text))

    def _write(self, text: str) -> None:
        if not self.muted:
            self._stdout.write(text)
            self._stdout.flush()

    def note(self, message: str) -> None:
        """Tell something worth knowing (--verbose)."""
        if self.verbose:
            self._tell(Text(message, style="dim"))

    def warn(self, message: str) -> None:
        """Tell something that may change a result."""
        self._tell(Text.assemble(("Warning: ", "yellow"), message))

    def suggest(self, message: str) -> None:
        """Tell of something better that the user could do."""
        if not (self.quiet or self.as_json):
            self._tell(Text.assemble(("Note: ", "dim"), message))

    def next_command(self, command: str) -> None:
        """End with what a user would run next."""
        if not (self.quiet or self.as_json):
            self._tell(Text.assemble(("Next: ", "dim"), (command, "bold")))

    def error(self, error: HisvdError, cause: BaseException | None = None) -> None:
        """Print an error: what is wrong (a line per problem), and what to do.

        Args:
            error: what the user is told.
            cause: print this one's traceback above it.
        """
        if cause is not None:
            for line in "".join(traceback.format_exception(cause)).rstrip().splitlines():
                self._tell(Text(line))
        for line in error.message.splitlines():
            self._tell(Text.assemble(("Error: ", "bold red"), line))
        if error.hint:
            self._tell(Text.assemble(("Hint: ", "cyan"), error.hint))

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
