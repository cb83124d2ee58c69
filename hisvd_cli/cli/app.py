"""The command line: mounts the commands, and is the one place that catches errors."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from hisvd_cli import __version__
from hisvd_cli.cli.brief_help import BriefHelp
from hisvd_cli.cli.commands.calibrate import calibrate
from hisvd_cli.cli.commands.compress import compress
from hisvd_cli.cli.commands.convert import convert
from hisvd_cli.cli.commands.eval import evaluate
from hisvd_cli.cli.commands.inspect import inspect
from hisvd_cli.cli.commands.plan import plan
from hisvd_cli.cli.console import Console
from hisvd_cli.cli.streams import check_written, prepare_streams
from hisvd_cli.utils.distributed import launched
from hisvd_cli.utils.errors import (
    HisvdError,
    MemoryLimitError,
    OutputError,
    StoppedError,
    UsageError,
    reason,
)
from hisvd_cli.utils.watchdog import end

_MEMORY_HINT = (
    "Lower --batch, --seqlen or --samples, give --max-memory, which keeps hidden states in a file, "
    "or use --dtype bfloat16 or --device cpu; finished blocks are kept."
)
_RESUME_HINT = "Run the same command again: it goes on after the last finished block."


class _Edge(TyperGroup):
    """Turns every failure into two lines on stderr and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: Any) -> Any:
        with _watched_interrupts() as interrupted:
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, Exception) as error:
                # Native code may put an error of its own in the place of KeyboardInterrupt.
                if interrupted() or isinstance(error, KeyboardInterrupt):
                    raise StoppedError("Interrupted.", _RESUME_HINT) from error
                raise

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
            check_written()
        except Exception as error:
            told = _explain(error)
            cause = error if os.environ.get("HISVD_DEBUG") == "1" else None
            if launched():
                end(told, lambda final: Console().error(final, cause))
            Console().error(told, cause)
            code = told.exit_code
        sys.exit(code)


@contextmanager
def _watched_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed while the body ran."""
    seen = threading.Event()

    def note(_signal: int, _frame: object) -> NoReturn:
        seen.set()
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _explain(error: Exception) -> HisvdError:
    """Return what the user is told of any failure."""
    for cause in _chain(error):
        if _is_memory(cause):
            return MemoryLimitError(_memory_message(cause), _MEMORY_HINT)
    if isinstance(error, HisvdError):
        return error
    if hasattr(error, "format_message"):  # Typer found a flag or an argument wrong
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hisvd"
        return UsageError(" ".join(error.format_message().split()), f"Run: {command} --help")
    if isinstance(error, OSError):
        where = f"Cannot use {error.filename}" if error.filename else "Cannot write"
        return OutputError(
            f"{where}: {reason(error)}",
            "Check the path, its permissions, and the space left on its disk.",
        )
    return HisvdError(
        f"Unforeseen {type(error).__name__}: {reason(error)}",
        "Run again with HISVD_DEBUG=1 for the traceback, and please report it.",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_memory(error: BaseException) -> bool:
    """Tell torch's CUDA error, its CPU allocator's, Python's and the system's from all others."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = ("can't allocate memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def _memory_message(error: BaseException) -> str:
    size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f"Out of memory: {size[1]} more were asked for." if size else "Out of memory."


app = typer.Typer(
    cls=_Edge,
    name="hisvd",
    help="Make a causal language model smaller by low-rank factorisation, without training it.",
    epilog="Start with: hisvd compress --model demo --ratio 0.6",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in {
    "calibrate": calibrate,
    "plan": plan,
    "compress": compress,
    "inspect": inspect,
    "eval": evaluate,
    "convert": convert,
}.items():
    app.command(_name, cls=BriefHelp)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().text(f"hisvd {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version.",
            metavar="",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Has no work of its own: the options above belong to no command."""


def main() -> None:
    """Run the command line."""
    prepare_streams()
    app()
