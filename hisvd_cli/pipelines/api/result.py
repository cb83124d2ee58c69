"""The common base of all results of the Python API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from hisvd_cli.pipelines.api import html
from hisvd_cli.utils.escaping import printable


class Result(ABC):
    """Something with facts: a line of them as text, a table of them in a notebook."""

    @abstractmethod
    def _facts(self) -> dict[str, object]:
        """Return what there is to say of it, by name."""

    def _tables(self) -> Sequence[str]:
        """Return more tables for a notebook, as HTML."""
        return ()

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"<{type(self).__name__} {' '.join(printable(facts).split())}>"

    def _repr_html_(self) -> str:
        return "".join([html.facts(type(self).__name__, self._facts()), *self._tables()])
