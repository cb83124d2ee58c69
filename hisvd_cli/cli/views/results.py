"""Renders the results of commands, at 80 columns or more, with and without colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.cli.views.charts import HeatMap, Shaded, short_name
from hisvd_cli.cli.views.layout import (
    duration_text,
    facts_table,
    make_table,
    perplexity_text,
    times_text,
)
from hisvd_cli.modeling.layers.shapes import numel, shape_text
from hisvd_cli.utils.quantities import counted, size_text

if TYPE_CHECKING:
    from hisvd_cli.calibration.store import Calibration
    from hisvd_cli.inspection.audit import Audit
    from hisvd_cli.pipelines.compressing.grid.cells import Cell
    from hisvd_cli.pipelines.compressing.outcome import Outcome

_MAX_PROBLEMS = 20


class Ranked(Shaded, Protocol):
    """A layer of the rank table."""

    @property
    def rank(self) -> int: ...


R = TypeVar("R", bound=Ranked)


def calibration_view(calibration: Calibration, seconds: float) -> RenderableType:
    """Return the folder, text and contents of a calibration."""
    data = calibration.manifest["data"]
    return facts_table(
        {
            "calibration": str(calibration.folder),
            "text": f"{data['dataset']} ({data['split']})",
            "tokens": f"{data['samples']} × {data['seqlen']} = {data['tokens']:,}",
            "precision": f"forward passes in {calibration.manifest['dtype']}",
            "contains": ", ".join(sorted(calibration.holds)).replace("-", " "),
            "time": duration_text(seconds),
        }
    )


def forecast_view(forecast: dict[str, Any]) -> RenderableType:
    """Return the time, memory and disk space that a run would need."""
    facts = {"time": f"about {duration_text(forecast['seconds'])}"}
    facts["peak memory"] = f"about {size_text(forecast['peak_memory_bytes'])}"
    if forecast["hidden_states"]:
        place = {"file": "in a file", "host": "in host memory"}
        facts["hidden states"] = (
            f"{place.get(forecast['hidden_states'], 'on the device')}, "
            f"{counted(forecast['batch'], 'window')} per forward pass"
        )
    if "dense_bytes" in forecast:
        dense, size = forecast["dense_bytes"], forecast["bytes"]
        facts["checkpoint"] = f"{size_text(size)} (dense {size_text(dense)}): {forecast['output']}"
        facts["calibration"] = size_text(forecast["calibration_bytes"])
    else:
        facts["calibration"] = size_text(forecast["bytes"])
    return Group(Text("Dry run: nothing was done.", style="bold"), facts_table(facts))


def _rank_cell(row: Ranked) -> Text:
    return Text("dense", style="dim") if row.dense else Text(str(row.rank))


def rank_table(
    rows: Sequence[R], width: int, cell: Callable[[R], Text] = _rank_cell, widest: int = 5
) -> RenderableType:
    """Return a table of ranks: full ranks first, then a line per block, with a column per type.

    Args:
        rows: the layers of a plan or an audit.
        width: columns of the terminal; types that do not fit go into another table.
        cell: returns the cell of a layer.
        widest: maximum width of a cell.
    """
    clusters = list(dict.fromkeys(row.cluster for row in rows))
    cells = {(row.layer, row.cluster): row for row in rows}
    full = {row.cluster: str(full_rank(row.shape)) for row in rows}
    layers = sorted({row.layer for row in rows if row.layer is not None})
    widest = max(widest, *(len(short_name(cluster)) for cluster in clusters))
    fit = max(1, (width - 7) // (widest + 2))
    tables: list[RenderableType] = []
    for start in range(0, len(clusters), fit):
        shown = clusters[start : start + fit]
        table = make_table("block", *map(short_name, shown), left=0)
        table.add_row("full", *(full[cluster] for cluster in shown), style="dim")
        for layer in layers:
            own = (cells.get((layer, c)) for c in shown)
            table.add_row(
                str(layer), *(cell(row) if row else Text("-", style="dim") for row in own)
            )
        tables.append(table)
    return Group(*tables)


def recovered_view(made: dict[str, Any]) -> RenderableType:
    """Return the result of a recovery with its held-out measures before and after."""
    recovery = made["recovery"]
    facts = {
        "checkpoint": f"{made['output']} ({size_text(made['bytes'])})",
        "from": made["from"],
        "trained": f"{recovery['method']}, {counted(recovery['steps'], 'step')}, "
        f"{counted(recovery['tokens'], 'token')}",
        "held out": ", ".join(
            f"{name} {value:.4f} → {recovery['best'][name]:.4f}"
            for name, value in recovery["before"].items()
        ),
        "time": f"{duration_text(made['seconds']['recover'])}, peak memory "
        f"{size_text(made['peak_memory_bytes'])}",
    }
    if recovery["stopped"]:
        facts["stopped"] = recovery["stopped"]
    return facts_table(facts)


def recovery_forecast_view(forecast: dict[str, Any]) -> RenderableType:
    """Return the output, the data and the time of a recovery."""
    facts = {
        "checkpoint": f"{forecast['output']} ({size_text(forecast['bytes'])})",
        "text": f"{counted(forecast['text_tokens'], 'token')}",
    }
    if forecast["tokens"]:
        facts["training"] = f"{counted(forecast['tokens'], 'token')}"
    if forecast["seconds"]:
        facts["time"] = f"at most {duration_text(forecast['seconds'])} of training"
    return Group(Text("Dry run: nothing was done.", style="bold"), facts_table(facts))


def compressed_view(outcome: Outcome) -> RenderableType:
    """Return the result of a compression, compared with the dense model, and its cost."""
    seconds = outcome.seconds
    stages = ", ".join(f"{name} {duration_text(value)}" for name, value in seconds.items())
    facts = {
        "checkpoint": str(outcome.output),
        "kept": f"{outcome.plan.kept_ratio:.2%} of the factored layers, "
        f"{outcome.plan.model_ratio:.2%} of the model",
        "precision": f"forward passes in {outcome.dtype}, weights in {outcome.stored_dtype}",
        "time": stages,
        "peak memory": size_text(outcome.peak_memory_bytes),
    }
    parts: list[RenderableType] = [facts_table(facts), Text(), _before_and_after(outcome)]
    if outcome.perplexity:
        before, _ = outcome.perplexity
        measured = (
            f"{counted(before.windows, 'window')} of {before.seqlen} tokens, {before.dataset}"
        )
        parts.append(Text(f" Perplexity: {measured}.", style="dim"))
    return Group(*parts)


def _before_and_after(outcome: Outcome) -> Table:
    table = make_table("", "before", "after", "ratio")
    total, kept = outcome.dense_parameters, outcome.parameters
    if total is not None and kept is not None:
        table.add_row("parameters", f"{total:,}", f"{kept:,}", f"{kept / total:.1%}")
    if outcome.plan.active_parameters is not None:
        total, kept = outcome.plan.active_parameters
        table.add_row("active per token", f"{total:,}", f"{kept:,}", f"{kept / total:.1%}")
    dense, size = outcome.dense_bytes, outcome.bytes
    table.add_row("size", size_text(dense), size_text(size), f"{size / dense:.1%}")
    if outcome.perplexity:
        before, after = outcome.perplexity
        texts = (perplexity_text(before), perplexity_text(after))
        table.add_row("perplexity", *texts, times_text(after, before))
    return table


def compressed_grid_view(cells: Sequence[Cell]) -> RenderableType:
    """Return the status and size of each checkpoint of a grid."""
    table = make_table("checkpoint", "", "size", "model ratio", "perplexity", left=2)
    table.columns[0].no_wrap = False
    table.columns[0].overflow = "fold"
    for cell in cells:
        plan, perplexity = cell.plan(), cell.outcome and cell.outcome.perplexity
        table.add_row(
            str(cell.output),
            Text(cell.status, style="red" if cell.failure else "dim"),
            size_text(cell.bytes) if plan else "-",
            f"{plan.model_ratio:.1%}" if plan else "-",
            perplexity_text(perplexity[1]) if perplexity else "-",
        )
    return table


def forecast_grid_view(forecast: dict[str, Any]) -> RenderableType:
    """Return the memory, disk space and time that the missing checkpoints of a grid would need."""
    facts = {
        each["output"]: f"{size_text(each['bytes'])}, peak memory "
        f"{size_text(each['peak_memory_bytes'])}"
        for each in forecast["cells"]
    }
    facts["time"] = f"about {duration_text(forecast['seconds'])} in total"
    return Group(Text("Dry run: nothing was done.", style="bold"), facts_table(facts))


def audit_view(audit: Audit, width: int, ranks: bool = False) -> RenderableType:
    """Return an audit: totals, the share of every layer, optionally its rank, and problems."""
    facts = {"kind": audit.kind, **audit.table, "on disk": size_text(audit.bytes)}
    if audit.dense_bytes and audit.bytes_ratio is not None:
        facts["on disk"] += f", {audit.bytes_ratio:.3%} of {size_text(audit.dense_bytes)}"
    if audit.parameters:
        facts["parameters"] = f"{audit.parameters:,} (dense {audit.dense_parameters:,})"
    if audit.active is not None:
        facts["active per token"] = "{:,} (dense {:,})".format(*audit.active)
    if audit.ratio is not None and audit.model_ratio is not None:
        kept = f"{audit.ratio:.3%} of the factored layers"
        facts["kept"] = f"{kept}, {audit.model_ratio:.3%} of the model"
    parts: list[RenderableType] = [Text(audit.target, style="bold"), facts_table(facts)]
    if audit.sublayers:
        parts += [Text(), HeatMap(audit.sublayers), Text(), _kept_table(audit)]
        parts += [Text(), rank_table(audit.sublayers, width)] if ranks else []
    parts += [Text(), *_problems(audit.problems)]
    return Group(*parts)


def _kept_table(audit: Audit) -> Table:
    table = make_table("layer type", "count", "shape", "low rank", "mean rank", "kept")
    for cluster in dict.fromkeys(row.cluster for row in audit.sublayers):
        rows = [row for row in audit.sublayers if row.cluster == cluster]
        low = [row.rank for row in rows if not row.dense]
        full = sum(numel(row.shape) for row in rows)
        table.add_row(
            cluster,
            str(len(rows)),
            shape_text(rows[0].shape),
            str(len(low)),
            f"{sum(low) / len(low):.1f}" if low else "-",
            f"{sum(row.parameters for row in rows) / full:.1%}",
        )
    return table


def _problems(problems: list[str]) -> list[Text]:
    if not problems:
        return [Text("No problems found.", style="green")]
    lines = [Text(f"{len(problems)} problem{'s' * (len(problems) > 1)}:", style="bold red")]
    lines += [Text(f"  {problem}") for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(Text(f"  and {len(problems) - _MAX_PROBLEMS} more (--json lists all)"))
    return lines
