"""Errors shown to the user: what is wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HisvdError(Exception):
    """A failure that the user can act on.

    Args:
        message: one line: what is wrong, with the offending value.
        hint: one line: what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HisvdError):
    """Invalid options, environment variables or profile; no work was started."""

    exit_code = 2


class SourceError(HisvdError):
    """A model, a checkpoint or one of its files is missing, unreadable or damaged."""


class UnsupportedModelError(HisvdError):
    """A model that cannot be compressed or read by hisvd."""


class DataError(HisvdError):
    """A dataset that is missing, empty, too short or unsuitable."""


class StaleArtifactError(HisvdError):
    """An artifact that was made from another model, other data or other settings."""


class NumericalError(HisvdError):
    """Non-finite weights, activations or moments."""


class BudgetError(HisvdError):
    """A parameter or byte budget that cannot be met."""


class OutputError(HisvdError):
    """An output path that already exists or cannot be written."""


class MemoryLimitError(HisvdError):
    """The run needs more memory than is available."""


class LostProcessError(HisvdError):
    """Another process of a distributed run has ended."""

    def __init__(self, message: str = "Another process of this run has ended.") -> None:
        super().__init__(
            message,
            "Run the same command again, with any number of processes: it resumes after the last "
            "completed block. If memory ran out, lower `calibration.batch`, `eval.batch` or "
            "`recover.batch`, whichever applies.",
        )


class StoppedError(HisvdError):
    """The user interrupted the run."""

    exit_code = 130


def suggest(value: str, known: Iterable[str]) -> str:
    """Return a sentence with the closest known name, or with all names if none is close."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    near = near or [name for name in names if value and name.startswith(value)]
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."


def reason(error: BaseException) -> str:
    """Return the first line of the message of an operating system or library error."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    line = str(text).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?", ":")) else f"{line}."
