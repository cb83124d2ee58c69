"""Renders plans with a budget in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hisvd_cli.allocation.byte_budget import BITS, FULL_BITS
from hisvd_cli.cli.views.charts import HeatMap
from hisvd_cli.cli.views.layout import make_table, size_text
from hisvd_cli.cli.views.results import rank_table
from hisvd_cli.pipelines.planning.tables import rank_span

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
    shape: tuple[int, int]
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
        _types(plan, number),
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


def _types(plan: Plan, number: float) -> Table:
    bits = [f"{each} bit" for each in BITS]
    table = make_table("layer type", "count", *bits, "dense", "ranks", "full", "kept")
    for cluster in plan.clusters:
        rows = [s for s in plan.sublayers if s.cluster == cluster.cluster]
        whole = number * sum(s.shape[0] * s.shape[1] for s in rows)
        table.add_row(
            cluster.cluster,
            str(cluster.sublayers),
            *(str(sum(s.bits == each for s in rows) or "-") for each in BITS),
            str(sum(s.dense for s in rows) or "-"),
            rank_span(sorted({s.rank for s in rows if not s.dense})),
            str(max(s.full_rank for s in rows)),
            f"{sum(s.bytes or 0 for s in rows) / whole:.1%}",
        )
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


def byte_facts(plan: Plan, counted: BytePlan) -> dict[str, str]:
    """Return the totals of a plan with a budget in bytes."""
    unspent = counted.budget - counted.kept
    return {
        "kept": f"{size_text(counted.kept)} of {size_text(counted.full)} "
        f"({counted.kept_ratio:.3%}); {unspent:,} bytes of the budget unused",
        "parameters": f"{plan.kept_parameters:,} of {plan.full_parameters:,} "
        f"({plan.kept_ratio:.3%})",
        "whole model": f"{counted.model_ratio:.2%} of the bytes kept",
        "rounding": f"{counted.method}; 4 bits in groups of {counted.group_size}; sizes include "
        "scales",
    }
