"""What the command line prints: results on stdout; progress, hints and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hisvd_cli.pipelines.config.mentions import in_flags
from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.escaping import printable
from hisvd_cli.utils.progress import SafeConsole, StderrReporter

_UNBOUNDED = 500  # columns of a file or a pipe, which need no line breaks


class Console(StderrReporter):
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
        super().__init__(quiet, verbose, muted)
        self.as_json = as_json
        self._stdout = sys.stdout
        bounded = self._stdout.isatty() or "COLUMNS" in os.environ
        self._out = SafeConsole(file=self._stdout, width=None if bounded else _UNBOUNDED)

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

    def suggest(self, message: str) -> None:
        """Tell of something better that the user could do; nothing with --json."""
        if not self.as_json:
            super().suggest(message)

    def worded(self, message: str) -> str:
        """Return a message with flags in place of the settings that it mentions."""
        return in_flags(message)

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
        for line in in_flags(error.message).splitlines():
            self._tell(Text.assemble(("Error: ", "bold red"), line))
        if error.hint:
            self._tell(Text.assemble(("Hint: ", "cyan"), in_flags(error.hint)))
