"""Renders plans, one at a time or side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hisvd_cli.cli.views.byte_plans import byte_choices
from hisvd_cli.cli.views.charts import HeatMap, sparkline
from hisvd_cli.cli.views.layout import duration_text, facts_table, make_table
from hisvd_cli.cli.views.results import rank_table
from hisvd_cli.pipelines.planning.tables import (
    CLUSTER_COLUMNS,
    active_text,
    byte_facts,
    cluster_rows,
    experts_text,
)

if TYPE_CHECKING:
    from hisvd_cli.allocation.plan import Plan
    from hisvd_cli.allocation.spectrum import Spectrum

_LOSSES = {
    "whitened": "mean squared output error",
    "fisher": "error in the K-FAC metric of the loss",
    "held-out": "error in the K-FAC metric of the loss, on held-out text",
    "weight": "energy of the weights",
}


def plan_view(plan: Plan, width: int, ranks: bool = False) -> RenderableType:
    """Return a plan: the share that each layer keeps, a row per layer type, and the totals.

    Args:
        plan: the plan.
        width: columns of the terminal.
        ranks: also show the rank of every layer.
    """
    if plan.bytes is not None:
        return Group(*byte_choices(plan, plan.bytes, width, ranks), Text(), _totals(plan))
    parts: list[RenderableType] = [
        Text(f"Share kept of each layer at keep {plan.ratio:g} ({plan.allocator})", style="bold"),
        HeatMap(plan.sublayers),
        Text(),
        _cluster_table(plan),
    ]
    if ranks:
        parts += [Text(), Text("Ranks", style="bold"), rank_table(plan.sublayers, width)]
    return Group(*parts, Text(), _totals(plan))


def spectra_view(spectra: Sequence[Spectrum], plan: Plan, width: int) -> RenderableType:
    """Return spectra as sparklines, with a mark at the rank of a plan.

    Args:
        spectra: spectra of some layers in the metric of the plan.
        plan: the plan.
        width: columns of the terminal.
    """
    rows = {row.name: row for row in plan.sublayers}
    parts: list[RenderableType] = [
        Text(f"Spectra at keep {plan.ratio:g} ({plan.allocator})", style="bold")
    ]
    for spectrum in spectra:
        energy = spectrum.energy.tolist()
        row = rows[spectrum.name]
        kept = sum(energy[: row.rank]) / (sum(energy) or 1)
        rank = f"dense, {row.full_rank}" if row.dense else f"{row.rank} of {row.full_rank}"
        parts.append(Text(f"{spectrum.name}: rank {rank}, {kept:.2%} of the energy kept"))
        parts.append(sparkline(energy, min(width, 76), None if row.dense else row.rank))
        parts.append(Text(f"σ² from {energy[0]:.3g} to {energy[-1]:.3g}", style="dim"))
    scale = (
        "σ² by component, on a logarithmic scale; the sum of those after the line is the "
        f"{_unit(plan)}."
    )
    return Group(*parts, Text(scale, style="dim"))


def comparison_view(plans: Sequence[Plan], width: int) -> RenderableType:
    """Return plans of several allocators side by side for each ratio.

    Args:
        plans: one per allocator and ratio, all for the same layers.
        width: columns of the terminal; allocators that do not fit go into another table.
    """
    parts: list[RenderableType] = []
    for ratio in dict.fromkeys(plan.ratio for plan in plans):
        beside = [plan for plan in plans if plan.ratio == ratio]
        least = min(plan.predicted_loss for plan in beside)
        parts.append(Text(f"Share kept of each layer type at keep {ratio:g}", style="bold"))
        parts += _comparison_tables(beside, least, width)
        lowest = f"Lowest predicted loss: {least:.6g} ({_unit(beside[0])})."
        parts.append(Text(lowest, style="dim"))
        parts.append(Text())
    return Group(*parts[:-1])


def _comparison_tables(plans: Sequence[Plan], least: float, width: int) -> list[RenderableType]:
    labels = [row.cluster for row in plans[0].clusters]
    first = max(map(len, [*labels, "predicted loss"])) + 2
    widest = max(len(plan.allocator) for plan in plans)
    fit = max(1, (width - first) // (max(widest, len("1.000 ×")) + 2))
    tables: list[RenderableType] = []
    for start in range(0, len(plans), fit):
        shown = plans[start : start + fit]
        table = make_table("layer type", *(plan.allocator for plan in shown))
        for i, label in enumerate(labels):
            table.add_row(label, *(f"{plan.clusters[i].kept_ratio:.1%}" for plan in shown))
        table.add_row()
        table.add_row("whole model", *(f"{plan.model_ratio:.1%}" for plan in shown))
        table.add_row("predicted loss", *(_times(plan.predicted_loss, least) for plan in shown))
        tables += [table, Text()]
    return tables


def _times(loss: float, least: float) -> str:
    """Return a loss as a multiple of the lowest one, or as it is if that is 0."""
    return f"{loss / least:.3f} ×" if least > 0 else f"{loss:.3g}"


def _unit(plan: Plan) -> str:
    """Return what the predicted loss of a plan measures."""
    return _LOSSES[plan.settings["metric"] if plan.calibrated else "weight"]


def _cluster_table(plan: Plan) -> Table:
    table = make_table(*CLUSTER_COLUMNS)
    for cells in cluster_rows(plan):
        table.add_row(*cells)
    return table


def _totals(plan: Plan) -> RenderableType:
    unspent = plan.budget_parameters - plan.kept_parameters
    facts = {
        "kept": f"{plan.kept_parameters:,} of {plan.full_parameters:,} parameters "
        f"({plan.kept_ratio:.3%}); {unspent:,} of the budget unused",
        "whole model": f"{plan.model_ratio:.2%} kept",
    }
    if plan.bytes is not None:
        facts = byte_facts(plan, plan.bytes)
    if text := experts_text(plan):
        facts["experts"] = text
    if plan.active_parameters is not None:
        facts["active per token"] = active_text(*plan.active_parameters[::-1])
    facts["predicted loss"] = f"{plan.predicted_loss:.6g} ({_unit(plan)})"
    if plan.storage == "pivoted":
        plain = "; experts are plain pairs" if experts_text(plan) else ""
        facts["storage"] = f"pivoted pairs: rank r takes r(m+n−r) + m parameters{plain}"
    if plan.settings["multiple_of"] > 1:
        facts["rounding"] = f"ranks are multiples of {plan.settings['multiple_of']}"
    return facts_table(facts)


def plan_forecast_view(forecast: Mapping[str, Any]) -> RenderableType:
    """Return the estimated time that each allocator takes to measure the model."""
    times = {
        name: f"about {duration_text(seconds)} of measuring" if seconds else "seconds"
        for name, seconds in forecast["allocators"].items()
    }
    return Group(Text("Dry run: nothing was done.", style="bold"), facts_table(times))
