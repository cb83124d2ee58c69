"""Output of the command line: results on stdout; progress, hints and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from hisvd_cli.cli.streams import check_open
from hisvd_cli.pipelines.config.mentions import in_flags
from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.escaping import printable
from hisvd_cli.utils.progress import SafeConsole, StderrReporter

if TYPE_CHECKING:
    from hisvd_cli.evaluation.grid import Failure

_UNBOUNDED = 500  # columns when stdout is a file or a pipe


def joint_error(failures: Sequence[Failure]) -> HisvdError:
    """Return one error for several models that failed, with the hint of the first."""
    lines = (f"{each.model}: {each.message}" for each in failures)
    return HisvdError("\n".join(lines), failures[0].hint)


class Console(StderrReporter):
    """Prints results, progress and errors, without markup or control characters from text.

    Args:
        as_json: print one JSON document to stdout and nothing else.
        quiet: print no progress or hints, and results in one line.
        verbose: print notes too.
        muted: print nothing, since another process prints the same.
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
        """Columns of the terminal on stdout."""
        return self._out.width

    def needs_stdout(self, *elsewhere: object) -> None:
        """Check, before any work, that stdout is open, unless the result also goes elsewhere.

        Raises:
            OutputError: stdout is closed, and nothing in ``elsewhere`` is set.
        """
        if not any(elsewhere):
            check_open(self._stdout)

    def alone(self) -> AbstractContextManager[object]:
        """Redirect other output from stdout to stderr while the body runs."""
        return redirect_stdout(sys.stderr)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or text, unless --json or --quiet is set."""
        if not (self.as_json or self.quiet):
            with self._out.capture() as captured:
                self._out.print(renderable)
            self._write(captured.get())

    def result(self, document: dict[str, Any], line: str) -> None:
        """Print the result as JSON (--json) or in one line (--quiet)."""
        if self.as_json:
            self.text(json.dumps(document, indent=2, allow_nan=False) + "\n")
        elif self.quiet:
            self.text(f"{line}\n")

    def text(self, text: str) -> None:
        """Print a text on stdout, without control characters. Raises BrokenPipeError if the reader
        has closed the pipe."""
        self._write(printable(text))

    def _write(self, text: str) -> None:
        if not self.muted:
            self._stdout.write(text)
            self._stdout.flush()

    def suggest(self, message: str) -> None:
        """Print a suggestion, unless --json is set."""
        if not self.as_json:
            super().suggest(message)

    def worded(self, message: str) -> str:
        """Return a message with flags in place of the settings that it mentions."""
        return in_flags(message)

    def next_command(self, command: str) -> None:
        """Print the command to run next."""
        if not (self.quiet or self.as_json):
            self._tell(Text.assemble(("Next: ", "dim"), (command, "bold")))

    def error(self, error: HisvdError, cause: BaseException | None = None) -> None:
        """Print an error, one line per problem, and its hint.

        Args:
            error: the error.
            cause: an exception whose traceback is printed first.
        """
        if cause is not None:
            for line in "".join(traceback.format_exception(cause)).rstrip().splitlines():
                self._tell(Text(line))
        for line in self.worded(error.message).splitlines():
            self._tell(Text.assemble(("Error: ", "bold red"), line))
        if error.hint:
            self._tell(Text.assemble(("Hint: ", "cyan"), self.worded(error.hint)))
