"""How the library tells of its progress, without knowing a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """What long work calls; the command line shows it, tests may collect it."""

    def stage(self, label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a stage of ``total`` steps; the function it yields counts one step."""
        ...

    def note(self, message: str) -> None:
        """Tell something worth knowing."""
        ...

    def suggest(self, message: str) -> None:
        """Tell of something better that the user could do."""
        ...

    def warn(self, message: str) -> None:
        """Tell something that may change a result."""
        ...


class Silent:
    """A reporter that says nothing."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[], None]]:  # noqa: ARG002
        """Yield a function that does nothing."""
        yield lambda: None

    def note(self, message: str) -> None:
        """Say nothing."""

    def suggest(self, message: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Say nothing."""
