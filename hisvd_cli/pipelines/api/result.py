"""The common base of all results of the Python API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from hisvd_cli.pipelines.api import html
from hisvd_cli.utils.escaping import printable


class Result(ABC):
    """A result that is shown as one line of facts, or as a table in a notebook."""

    @abstractmethod
    def _facts(self) -> dict[str, object]:
        """Return facts by name."""

    def _tables(self) -> Sequence[str]:
        """Return further tables for a notebook, as HTML."""
        return ()

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"<{type(self).__name__} {' '.join(printable(facts).split())}>"

    def _repr_html_(self) -> str:
        return "".join([html.facts(type(self).__name__, self._facts()), *self._tables()])
