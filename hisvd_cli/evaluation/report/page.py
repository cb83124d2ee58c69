"""Renders a report as an HTML page."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.evaluation.grid import Evaluation
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.report import palette
from hisvd_cli.evaluation.report.content import ModelFacts, Report, as_text, flat, short_name
from hisvd_cli.evaluation.report.figures import curves, heat_map, spectra_figures
from hisvd_cli.evaluation.report.tables import NOTHING, Number, speed_table, task_rows
from hisvd_cli.modeling.layers.shapes import shape_text
from hisvd_cli.utils.errors import UsageError

_HERE = Path(__file__).parent
_TEMPLATE = "template.html.jinja"
_LIBRARIES = ("jinja2", "matplotlib")
_FORMS = {"bits_per_byte": "{:.4f}", "kl": "{:.4f}", "agreement": "{:.1%}"}


def check_libraries() -> None:
    """Raise UsageError if a library that reports need is not installed."""
    for name in _LIBRARIES:
        if find_spec(name) is None:
            raise UsageError(
                f"`report` requires the package '{name}'.", "Run: pip install 'hisvd[report]'"
            )


def render(report: Report) -> str:
    """Return the page; it is reproducible to the byte."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": as_text, "short": short_name}
    environment.filters["svg"] = Markup  # matplotlib has escaped all names in it
    planned = report.planned
    dense = planned[0][1] if planned else None
    return environment.get_template(_TEMPLATE).render(
        report=report,
        palette=palette,
        texts=[
            {
                "of": first,
                "rows": [_row(*each) for each in report.results(i)],
                "curves": curves(report, i),
            }
            for i, first in enumerate(report.datasets)
        ],
        experts=any(plan.active_parameters is not None for _, plan in planned),
        heat_maps=[heat_map(facts.name, plan, i) for i, (facts, plan) in enumerate(planned)],
        spectra=spectra_figures(report.spectra, dense) if report.spectra and dense else [],
        sublayers=_sublayers(report),
        details=_details(report),
        times=_times(report),
        tasks=task_rows(report.grid.rows()),
        speeds=speed_table(report.grid.rows()),
    )


def _row(each: Evaluation, facts: ModelFacts, result: PerplexityResult) -> dict[str, Any]:
    plan = facts.plan
    return {
        "model": each.model,
        "kept": Number(f"{plan.kept_ratio:.1%}", "", plan.kept_ratio) if plan else NOTHING,
        "whole": Number(f"{plan.model_ratio:.1%}", "", plan.model_ratio) if plan else NOTHING,
        "active": _active(plan),
        "size": Number(f"{facts.bytes / 1e6:,.1f}", "", facts.bytes),
        "figures": [_figure(result, name) for name in ("perplexity", *_FORMS)],
    }


def _active(plan: Plan | None) -> Number:
    """Return the share kept of the parameters that one token uses, for models with experts."""
    if plan is None or plan.active_parameters is None:
        return NOTHING
    dense, kept = plan.active_parameters
    return Number(f"{kept / dense:.1%}", "", kept / dense)


def _figure(result: PerplexityResult, name: str) -> Number:
    value: float | None = getattr(result, name)
    if value is None:
        return Number("not finite" if name == "perplexity" else "–")
    form = _FORMS.get(name, "{:,.2f}" if value < 1e4 else "{:.3e}")
    bounds = (result.intervals or {}).get(name)
    shown = f"{form.format(bounds[0])} to {form.format(bounds[1])}" if bounds else ""
    return Number(form.format(value), shown, value)


def _sublayers(report: Report) -> list[dict[str, Any]]:
    """Return a row for each linear layer with its rank in each model that has a plan."""
    names: dict[str, dict[str, Any]] = {}
    ranks: list[dict[str, Number]] = []
    for _, plan in report.planned:
        for row in plan.sublayers:
            facts = {
                "layer": row.layer,
                "type": row.cluster,
                "shape": shape_text(row.shape),
            }
            names.setdefault(row.name, {**facts, "full": row.full_rank})
        ranks.append(
            {
                r.name: Number("dense" if r.dense else str(r.rank), "", r.rank)
                for r in plan.sublayers
            }
        )
    return [
        {"name": name, **facts, "ranks": [each.get(name, NOTHING) for each in ranks]}
        for name, facts in names.items()
    ]


def _times(report: Report) -> tuple[list[str], list[tuple[str, list[Number]]]]:
    """Return the stages, and the seconds in each for the models whose durations are known."""
    known = [(facts.name, facts.seconds) for facts, _ in report.planned if facts.seconds]
    stages = list(dict.fromkeys(stage for _, seconds in known for stage in seconds))
    rows = [
        (
            name,
            [_seconds(seconds.get(stage)) for stage in stages] + [_seconds(sum(seconds.values()))],
        )
        for name, seconds in known
    ]
    return stages, rows


def _seconds(value: float | None) -> Number:
    return NOTHING if value is None else Number(f"{value:,.1f}", "", value)


def _details(report: Report) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return all settings and versions: of this run, then of each model that records them."""
    run = {"settings": report.settings, "versions": report.versions}
    records = [(each.model, report.models[each.model].record) for each in report.grid.rows()]
    found = [("This evaluation", run), *((model, record) for model, record in records if record)]
    return [(title, flat(document)) for title, document in found]
