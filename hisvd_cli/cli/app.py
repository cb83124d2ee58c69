"""The entry point of the command line, and its error handling."""

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
from hisvd_cli.cli.brief_help import BriefHelp, without_metavars
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
    "Lower --batch, --seqlen or --samples, set --max-memory to keep hidden states in a file, or "
    "use --dtype bfloat16 or --device cpu. Completed blocks are kept."
)
_RESUME_HINT = "Run the same command again to resume after the last completed block."


class _ErrorHandlingGroup(TyperGroup):
    """Turns every exception into an error and a hint on stderr, and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def get_params(self, ctx: Any) -> list[Any]:
        return without_metavars(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        with _watched_interrupts() as interrupted:
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, Exception) as error:
                # Native code may raise another error instead of KeyboardInterrupt.
                if interrupted() or isinstance(error, KeyboardInterrupt):
                    raise StoppedError("Interrupted.", _RESUME_HINT) from error
                raise

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
            check_written()
        except Exception as error:
            explained = _explain(error)
            cause = error if os.environ.get("HISVD_DEBUG") == "1" else None
            if launched():
                end(explained, lambda final: Console().error(final, cause))
            Console().error(explained, cause)
            code = explained.exit_code
        sys.exit(code)


@contextmanager
def _watched_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed while the body ran."""
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
    """Return the error to show for an exception."""
    for cause in _chain(error):
        if _is_memory(cause):
            return MemoryLimitError(_memory_message(cause), _MEMORY_HINT)
    if isinstance(error, HisvdError):
        return error
    if hasattr(error, "format_message"):  # a usage error from Typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hisvd"
        return UsageError(" ".join(error.format_message().split()), f"Run: {command} --help")
    if isinstance(error, OSError):
        where = f"Cannot use {error.filename}" if error.filename else "Cannot write"
        return OutputError(
            f"{where}: {reason(error)}",
            "Check the path, its permissions and the free disk space.",
        )
    return HisvdError(
        f"Internal error ({type(error).__name__}): {reason(error)}",
        "Please report this with the traceback, which HISVD_DEBUG=1 shows.",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_memory(error: BaseException) -> bool:
    """Return whether an error from torch, Python or the system means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    texts = ("can't allocate memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _memory_message(error: BaseException) -> str:
    size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f"Out of memory: cannot allocate {size[1]}." if size else "Out of memory."


app = typer.Typer(
    cls=_ErrorHandlingGroup,
    name="hisvd",
    help="Compress causal language models by low-rank factorization.",
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
    """Defines the options of ``hisvd`` itself."""


def main() -> None:
    """Run the command line."""
    prepare_streams()
    app()
