"""The errors that a user sees: what is wrong with which value, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HisvdError(Exception):
    """A failure with a cause that the user can act on.

    Args:
        message: one line, what is wrong with which value.
        hint: one line, what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HisvdError):
    """Wrong flags, environment or profile; nothing was started."""

    exit_code = 2


class SourceError(HisvdError):
    """A model, a checkpoint or one of its files is missing, unreadable or damaged."""


class UnsupportedModelError(HisvdError):
    """A model whose blocks hold something that cannot be factored."""


class DataError(HisvdError):
    """A text that is missing, empty, too short, or the wrong one."""


class StaleArtifactError(HisvdError):
    """An artifact that was made from another model, other data or other settings."""


class NumericalError(HisvdError):
    """Non-finite weights, activations or moments."""


class BudgetError(HisvdError):
    """A budget that cannot be met."""


class OutputError(HisvdError):
    """An output path that is in the way, or cannot be written."""


class MemoryLimitError(HisvdError):
    """More memory was asked for than there is."""


class LostProcessError(HisvdError):
    """Another process of a run of several has ended."""

    def __init__(self, message: str = "Another process of this run has ended.") -> None:
        super().__init__(
            message,
            "Run the same command again, with any number of processes: finished blocks are kept. "
            "Out of memory? Lower --batch, --seqlen or --samples.",
        )


class StoppedError(HisvdError):
    """The user interrupted the run."""

    exit_code = 130


def suggest(value: str, known: Iterable[str]) -> str:
    """Return a sentence with the nearest known name, or all of them where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    near = near or [name for name in names if value and name.startswith(value)]
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."


def reason(error: BaseException) -> str:
    """Return in one line what an error of the operating system or of a library says."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    line = str(text).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?", ":")) else f"{line}."
