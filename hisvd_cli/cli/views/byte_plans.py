"""Renders plans with a budget in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hisvd_cli.allocation.byte_budget import FULL_BITS
from hisvd_cli.cli.views.charts import HeatMap
from hisvd_cli.cli.views.layout import make_table
from hisvd_cli.cli.views.results import rank_table
from hisvd_cli.modeling.layers.shapes import Shape
from hisvd_cli.pipelines.planning.tables import BYTE_COLUMNS, byte_rows

if TYPE_CHECKING:
    from hisvd_cli.allocation.byte_frontier import Point
    from hisvd_cli.allocation.plan import Plan
    from hisvd_cli.allocation.plans.rows import BytePlan, SublayerPlan

_VISIBLE = 5e-4
"""File sizes are shown if they exceed the budget by this share of the bytes of the model."""


@dataclass(frozen=True)
class _ByteShare:
    """A layer of the heat map, with bytes in place of parameters."""

    layer: int
    cluster: str
    shape: Shape
    parameters: int
    dense: bool


def byte_choices(plan: Plan, counted: BytePlan, width: int, ranks: bool) -> list[RenderableType]:
    """Return the share that each layer keeps, a row per layer type, and optionally (``ranks``) the
    rank and bits of each layer."""
    title = f"Bytes kept of each layer at bytes ratio {counted.ratio:g} ({plan.allocator})"
    number = counted.full / plan.full_parameters  # bytes per parameter of the model
    parts: list[RenderableType] = [
        Text(title, style="bold"),
        HeatMap([_byte_share(row, number) for row in plan.sublayers]),
        Text(),
        _types(plan, counted),
    ]
    if ranks:
        table = rank_table(plan.sublayers, width, _cell, len("dense/16"))
        parts += [Text(), Text("Ranks and bits", style="bold"), table]
    return [*parts, Text(), *_frontier(counted.frontier)]


def _byte_share(row: SublayerPlan, number: float) -> _ByteShare:
    whole = row.dense and row.bits == FULL_BITS
    return _ByteShare(row.layer, row.cluster, row.shape, round((row.bytes or 0) / number), whole)


def _cell(row: SublayerPlan) -> Text:
    return Text(f"{'dense' if row.dense else row.rank}/{row.bits}")


def _types(plan: Plan, counted: BytePlan) -> Table:
    table = make_table(*BYTE_COLUMNS)
    for cells in byte_rows(plan, counted):
        table.add_row(*cells)
    return table


def _frontier(points: Sequence[Point]) -> list[RenderableType]:
    """Return the predicted loss of each method at each ratio, with file sizes above the budget."""
    ratios = sorted({p.budget for p in points if p.budget is not None}, reverse=True)
    table = make_table("predicted loss at bytes ratio", *(f"{ratio:g}" for ratio in ratios))
    for method in dict.fromkeys(p.method for p in points if p.budget is not None):
        own = {p.budget: p for p in points if p.method == method}
        losses = (f"{own[r].predicted_loss:.4g}" if r in own else "-" for r in ratios)
        table.add_row(method, *losses)
        if any(r is not None and p.bytes_ratio > r + _VISIBLE for r, p in own.items()):
            taken = (f"{own[r].bytes_ratio:.3f}" if r in own else "-" for r in ratios)
            table.add_row("  actual bytes ratio", *taken, style="dim")
    fixed = [
        Text(f" {p.method}: {p.predicted_loss:.4g} at bytes ratio {p.bytes_ratio:.3f}")
        for p in points
        if p.budget is None
    ]
    return [table, *fixed]
