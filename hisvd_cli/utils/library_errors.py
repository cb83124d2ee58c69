"""Errors of other libraries on files that they cannot use ─► errors that a user can act on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hisvd_cli.utils.errors import HisvdError, reason


@contextmanager
def library_errors(refused: Callable[[str], HisvdError]) -> Iterator[None]:
    """Raise what ``refused`` makes of the reason of any error of the body.

    Only calls of another library on a file belong into the body. On a damaged file transformers,
    torch and gguf raise whatever their code stumbles over (AttributeError, ZeroDivisionError,
    RecursionError), tokenizers raises ``Exception`` itself, and Rust's panics are no ``Exception``:
    no list of types would do. The interrupt of the user passes, and so do errors of our own.

    Args:
        refused: makes the error from one line that says why.
    """
    try:
        yield
    except HisvdError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refused(reason(error)) from error
