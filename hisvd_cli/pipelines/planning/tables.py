"""A plan as tables of text cells and totals, for the terminal and for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from hisvd_cli.allocation.byte_budget import BITS
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.allocation.plans.rows import BytePlan
from hisvd_cli.modeling.layers.shapes import is_stack, numel, shape_text
from hisvd_cli.utils.quantities import size_text

CLUSTER_COLUMNS = (
    *("layer type", "count", "density", "tail share", "factor", "ranks", "full", "kept"),
)
BYTE_COLUMNS = (
    *("layer type", "count", *(f"{each} bit" for each in BITS), "dense", "ranks", "full", "kept"),
)


def cluster_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return a row of cells for each layer type."""
    table: list[tuple[str, ...]] = []
    for row in plan.clusters:
        rows = [s for s in plan.sublayers if s.cluster == row.cluster]
        cells = (
            row.cluster,
            str(row.sublayers),
            "-" if row.density is None else f"{row.density:.3f}",
            f"{row.tail_share:.4f}",
            "-" if row.factor is None else f"{row.factor:.4f}",
            rank_span(sorted({s.rank for s in rows if not s.dense})),
            str(max((s.full_rank for s in rows), default=0)),
            f"{row.kept_ratio:.1%}",
        )
        table.append(cells)
    return table


def byte_rows(plan: Plan, counted: BytePlan) -> list[tuple[str, ...]]:
    """Return a row of cells for each layer type of a plan by bytes."""
    number = counted.full / plan.full_parameters  # bytes per parameter of the model
    table: list[tuple[str, ...]] = []
    for cluster in plan.clusters:
        rows = [s for s in plan.sublayers if s.cluster == cluster.cluster]
        whole = number * sum(numel(s.shape) for s in rows)
        cells = (
            cluster.cluster,
            str(cluster.sublayers),
            *(str(sum(s.bits == each for s in rows) or "-") for each in BITS),
            str(sum(s.dense for s in rows) or "-"),
            rank_span(sorted({s.rank for s in rows if not s.dense})),
            str(max(s.full_rank for s in rows)),
            f"{sum(s.bytes or 0 for s in rows) / whole:.1%}",
        )
        table.append(cells)
    return table


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


def rank_span(ranks: Sequence[int]) -> str:
    """Return the range of sorted ranks, as text."""
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def experts_text(plan: Plan) -> str:
    """Return the types of the stacks of experts with their shapes; empty without stacks."""
    known = {(s.cluster, s.shape): None for s in plan.sublayers if is_stack(s.shape)}
    return ", ".join(f"{cluster} {shape_text(shape)}" for cluster, shape in known)


def active_text(active: int, dense: int) -> str:
    """Return the parameters that one token uses, in a compressed model and the dense one."""
    return f"{active:,} of {dense:,} parameters ({active / dense:.2%})"
