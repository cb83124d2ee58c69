"""Renders evaluations: tables of figures and rankings of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cmp_to_key
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from hisvd_cli.cli.views.efficiency import speed_view, tasks_view
from hisvd_cli.cli.views.layout import make_table, perplexity_text, times_text
from hisvd_cli.utils.quantities import counted

if TYPE_CHECKING:
    from rich.table import Table

    from hisvd_cli.evaluation.grid import Grid
    from hisvd_cli.evaluation.perplexity import Comparison, PerplexityResult

_NAME_COLUMNS = 20
_RANKED = {"nats_per_token": "perplexity", "kl": "KL", "agreement": "agreement"}


def grid_view(grid: Grid) -> RenderableType:
    """Return the results of every model, with intervals below the figures."""
    parts: list[RenderableType] = []
    rows = grid.rows()
    for i, first in enumerate(rows[0].results if rows else ()):
        title = f"{first.dataset.rpartition('/')[2]} ({first.split})"
        size = f"{counted(first.windows, 'window')} of {first.seqlen} tokens, BOS: {first.bos}"
        size += f", {first.dtype}" if first.dtype else ""
        parts += [Text(title, style="bold"), Text(f"{size}.", style="dim")]
        parts += [_table(grid, [row.results[i] for row in rows]), Text()]
        parts += _rankings(grid, first.dataset)
    if any(each and each.intervals for row in rows for each in row.results):
        parts += [Text(_interval_note(rows[0].results[0]), style="dim"), Text()]
    names = _short_names([row.model for row in rows])
    parts += tasks_view(rows, names)
    for name, row in zip(names, rows, strict=True):
        parts += speed_view(name, row.speed) if row.speed else []
    if parts and isinstance(parts[-1], Text) and not parts[-1].plain:
        parts.pop()
    return Group(*parts)


def _table(grid: Grid, results: Sequence[PerplexityResult]) -> Table:
    compared = grid.baseline is not None
    columns = ["perplexity", *(["ratio"] if compared else []), "bits/byte"]
    columns += ["KL", "agreement"] if compared else []
    table = make_table("model", *columns, fold=_NAME_COLUMNS)
    names = _short_names([row.model for row in grid.rows()])
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        cells = _cells(result, results[0] if compared else None)
        table.add_row(name, *(value for value, _ in cells))
        below = ["(baseline)" if compared and i == 0 else "", *(bounds for _, bounds in cells)]
        if any(below):
            table.add_row(*below, style="dim")
    return table


def _cells(result: PerplexityResult, baseline: PerplexityResult | None) -> list[tuple[str, str]]:
    """Return each figure and its interval as text."""
    known = result.intervals or {}

    def cell(name: str, value: float | None, text: Callable[[float], str]) -> tuple[str, str]:
        bounds = known.get(name)
        shown = "" if bounds is None else f"{text(bounds[0])}–{text(bounds[1])}"
        return "-" if value is None else text(value), shown

    cells = [(perplexity_text(result), cell("perplexity", None, _short)[1])]
    if baseline is not None:
        cells.append((times_text(result, baseline), ""))
    cells.append(cell("bits_per_byte", result.bits_per_byte, "{:.3f}".format))
    if baseline is not None:
        cells.append(cell("kl", result.kl, "{:#.3g}".format))
        cells.append(cell("agreement", result.agreement, lambda share: f"{share:.1%}"))
    return cells


def _short(perplexity: float) -> str:
    return f"{perplexity:#.4g}" if perplexity < 1e4 else f"{perplexity:.2e}"


def _rankings(grid: Grid, dataset: str) -> list[Text]:
    """Return rankings of the models on a text, a line for each figure."""
    mine = [each for each in grid.comparisons if each.dataset == dataset]
    if grid.baseline:
        mine += [c for each in grid.evaluations for c in each.comparisons if c.dataset == dataset]
    lines = []
    for figure, title in _RANKED.items():
        found = [each for each in mine if each.figure == figure and each.interval]
        if found:
            lines.append(Text(f"{title}: {_ranking(found)}"))
    return lines


def _ranking(comparisons: Sequence[Comparison]) -> str:
    """Return models in order: ``a > b`` if a is significantly better, else ``a ≈ b``."""
    known = {(each.model, each.other): each for each in comparisons}
    known |= {(each.other, each.model): each for each in comparisons}
    models = list(dict.fromkeys(name for pair in known for name in pair))

    def order(one: str, two: str) -> int:
        each = known.get((one, two))
        if each is None:
            return 0
        first_is_less = (each.difference < 0) == (each.model == one)
        return -1 if first_is_less != (each.figure == "agreement") else 1

    ranked = sorted(models, key=cmp_to_key(order))
    names = dict(zip(models, _short_names(models), strict=True))
    text = names[ranked[0]]
    for better, worse in pairwise(ranked):
        pair = known.get((better, worse))
        text += f" {'>' if pair and pair.better == better else '≈'} {names[worse]}"
    return text


def _short_names(models: Sequence[str]) -> list[str]:
    """Return the last component of each name, or the whole name if it would be ambiguous."""
    short = [Path(model).name or model for model in models]
    return [
        name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)
    ]


def _interval_note(result: PerplexityResult) -> str:
    made = result.bootstrap or {}
    return (
        f"Intervals: {made['level']:.0%}, {made['draws']} bootstrap resamples of {made['units']} "
        f"{made['unit']}; > means better: the interval of the paired difference excludes 0."
    )
