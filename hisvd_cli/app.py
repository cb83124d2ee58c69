"""The command line: mounts the commands, and is the one place that catches errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hisvd_cli import __version__
from hisvd_cli.commands.calibrate import calibrate
from hisvd_cli.commands.compress import compress
from hisvd_cli.commands.convert import convert
from hisvd_cli.commands.eval import evaluate
from hisvd_cli.commands.inspect import inspect
from hisvd_cli.commands.plan import plan
from hisvd_cli.console import Console
from hisvd_cli.errors import HisvdError

_MEMORY_HINT = (
    "Lower --batch, --samples or --seqlen, or use --device cpu; finished blocks are kept."
)


class _Group(TyperGroup):
    """Turns every failure of a command into two lines and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        if os.environ.get("HISVD_DEBUG") == "1":
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except HisvdError as error:
            Console().error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            hint = "Run the same command again to go on after the last finished block."
            Console().error(HisvdError("Interrupted.", hint))
            raise typer.Exit(130) from error
        except MemoryError as error:
            Console().error(HisvdError("Out of memory.", _MEMORY_HINT))
            raise typer.Exit(1) from error
        except (
            RuntimeError,
            OSError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            AssertionError,
            AttributeError,
            ImportError,
        ) as error:
            if isinstance(error, RuntimeError) and _is_exit(error):
                raise
            Console().error(_unforeseen(error))
            raise typer.Exit(1) from error


def _is_exit(error: RuntimeError) -> bool:
    """Typer's own way out is a RuntimeError with an exit code."""
    return hasattr(error, "exit_code")


def _unforeseen(error: Exception) -> HisvdError:
    text = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return HisvdError(f"Out of memory: {text}", _MEMORY_HINT)
    return HisvdError(
        f"Unforeseen {type(error).__name__}: {text}",
        "Run again with HISVD_DEBUG=1 for the traceback, and please report it.",
    )


app = typer.Typer(
    cls=_Group,
    name="hisvd",
    help="Make a causal language model smaller by low-rank factorisation, without training it.",
    epilog="Start with: hisvd compress --model demo --ratio 0.6",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("calibrate")(calibrate)
app.command("plan")(plan)
app.command("compress")(compress)
app.command("inspect")(inspect)
app.command("eval")(evaluate)
app.command("convert")(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().text(f"hisvd {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: ARG001  (handled by its callback)
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    # Libraries that draw progress bars of their own would draw over ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def main() -> None:
    """Run the command line."""
    app()
    sys.exit(0)
