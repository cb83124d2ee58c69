"""Results as HTML for notebooks; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hisvd_cli.utils.escaping import printable


def facts(title: str, values: Mapping[str, object]) -> str:
    """Return names and values as a table of two columns."""
    rows = "".join(
        f'<tr><th style="text-align:left">{_text(name)}</th>'
        f'<td style="text-align:left">{_text(value)}</td></tr>'
        for name, value in values.items()
    )
    return f"<table><caption>{_text(title)}</caption><tbody>{rows}</tbody></table>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return escape(printable(str(value)))
