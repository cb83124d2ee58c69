"""Converts errors that other libraries raise on unusable files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hisvd_cli.utils.errors import HisvdError, reason


@contextmanager
def library_errors(refused: Callable[[str], HisvdError]) -> Iterator[None]:
    """Convert any error raised in the body to the one that ``refused`` returns.

    The body should only contain calls of another library on a file. On damaged files,
    transformers, torch and gguf raise arbitrary types (AttributeError, ZeroDivisionError,
    RecursionError), tokenizers raises ``Exception`` itself, and Rust panics do not derive from
    ``Exception``, so a list of types would never be complete. KeyboardInterrupt and
    :class:`HisvdError` pass through unchanged.

    Args:
        refused: returns the error for a one-line reason.
    """
    try:
        yield
    except HisvdError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refused(reason(error)) from error
