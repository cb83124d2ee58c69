"""Table layout and number formats that all views share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hisvd_cli.evaluation.perplexity import PerplexityResult


def size_text(count: float) -> str:
    """Return bytes in the unit that people use: 538.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:  # where it would be rounded to 1000.0
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def duration_text(seconds: float) -> str:
    """Return seconds as 12.3 s, 4 min 05 s or 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def make_table(*columns: str, left: int = 1) -> Table:
    """Return an empty table; all but the first ``left`` columns hold numbers."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def facts_table(facts: dict[str, str]) -> Table:
    """Return a table of names and values, a line each."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def perplexity_text(result: PerplexityResult) -> str:
    """Return a perplexity with four significant figures, or what is wrong with it."""
    if result.perplexity is None:
        windows = result.nonfinite_windows
        return f"not finite (window {windows[0]})" if windows else "not finite"
    return f"{result.perplexity:#.4g}" if result.perplexity < 1e4 else f"{result.perplexity:.3e}"


def times_text(result: PerplexityResult, baseline: PerplexityResult) -> str:
    """Return how many times as large a perplexity is as the baseline's."""
    if result.perplexity is None or baseline.perplexity is None:
        return "-"
    return f"{result.perplexity / baseline.perplexity:.2f} ×"
