"""How results are shown: as one line, or as HTML in a notebook; all text is escaped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from html import escape

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
        line = "; ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"<{type(self).__name__} {' '.join(printable(line).split())}>"

    def _repr_html_(self) -> str:
        return "".join([facts(type(self).__name__, self._facts()), *self._tables()])


def facts(title: str, values: Mapping[str, object]) -> str:
    """Return names and values as a table of two columns."""
    rows = "".join(
        f'<tr><th style="text-align:left">{_text(name)}</th>'
        f'<td style="text-align:left">{_text(value)}</td></tr>'
        for name, value in values.items()
    )
    return f"<table><caption>{_text(title)}</caption><tbody>{rows}</tbody></table>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """Return a table."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in rows)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return escape(printable(str(value)))
