"""Shared table layout and number formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hisvd_cli.evaluation.perplexity import PerplexityResult


def duration_text(seconds: float) -> str:
    """Return seconds as 12.3 s, 4 min 05 s or 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def make_table(*columns: str, left: int = 1, fold: int | None = None) -> Table:
    """Return an empty table.

    Args:
        columns: headings.
        left: number of columns that are left-aligned; the others are right-aligned.
        fold: maximum width of the left-aligned columns, which wrap; None for no wrapping.
    """
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for i, column in enumerate(columns):
        if i < left and fold is not None:
            table.add_column(column, overflow="fold", max_width=fold)
        else:
            table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def facts_table(facts: dict[str, str]) -> Table:
    """Return a table of names and values, one per line."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def perplexity_text(result: PerplexityResult) -> str:
    """Return a perplexity with four significant digits, or why there is none."""
    if result.perplexity is None:
        windows = result.nonfinite_windows
        return f"not finite (window {windows[0]})" if windows else "not finite"
    return f"{result.perplexity:#.4g}" if result.perplexity < 1e4 else f"{result.perplexity:.3e}"


def times_text(result: PerplexityResult, baseline: PerplexityResult) -> str:
    """Return the ratio of a perplexity to that of the baseline."""
    if result.perplexity is None or baseline.perplexity is None:
        return "-"
    return f"{result.perplexity / baseline.perplexity:.2f} ×"
