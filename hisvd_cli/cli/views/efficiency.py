"""Renders speeds and task scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from hisvd_cli.cli.views.layout import make_table
from hisvd_cli.utils.quantities import size_text

if TYPE_CHECKING:
    from hisvd_cli.evaluation.efficiency import Phase, Timing
    from hisvd_cli.evaluation.grid import Evaluation
    from hisvd_cli.evaluation.speed import BatchSpeed, Speed

_NAME_COLUMNS = 24


def tasks_view(rows: Sequence[Evaluation], names: Sequence[str]) -> list[RenderableType]:
    """Return a table of task scores; nothing if no tasks were run.

    Args:
        rows: the evaluations, the baseline first.
        names: display names of the models.
    """
    if not any(row.scores for row in rows):
        return []
    table = make_table("task", "metric", "model", "value", "± stderr", left=3, fold=_NAME_COLUMNS)
    labels = dict.fromkeys((s.task, s.measure) for row in rows for s in row.scores or ())
    for label in labels:
        head = label
        for row, name in zip(rows, names, strict=True):
            for s in row.scores or ():
                if (s.task, s.measure) == label:
                    value = "not finite" if s.value is None else f"{s.value:.4f}"
                    table.add_row(*head, name, value, "" if s.stderr is None else f"{s.stderr:.4f}")
                    head = ("", "")
    return [Text("Tasks (lm-eval)", style="bold"), table, Text()]


def speed_view(name: str, speed: Speed) -> list[RenderableType]:
    """Return the speed of a model compared with the baseline."""
    compared = speed.baseline_weight_bytes is not None
    columns = ["batch", "phase", "tokens/s", *(["baseline", "speed"] if compared else [])]
    table = make_table(*columns, "ms: p50", "p90", "p99", left=0)
    table.columns[columns.index("phase")].justify = "left"
    for at_batch in speed.speeds:
        for row in _batch_rows(at_batch):
            table.add_row(*row)
    lines: list[RenderableType] = [
        Text(f"{speed.conditions}.", "dim"),
        table,
        Text(_memory_line(speed)),
    ]
    if compared:
        lines.append(_verdict(speed))
    return [Text(f"Speed of {name}", style="bold"), Group(*lines), Text()]


def _batch_rows(at_batch: BatchSpeed) -> list[list[str]]:
    rows: list[list[str]] = []
    compared = at_batch.versus()
    for phase in ("prefill", "decode"):
        row = ["" if rows else str(at_batch.batch), phase, _rate(at_batch.own, phase)]
        if at_batch.baseline is not None:
            each = compared[phase]
            row += [_rate(at_batch.baseline, phase), f"{each.speedup:.2f}× {each.verdict}"]
        rows.append([*row, *(f"{1000 * s:.4g}" for s in at_batch.own.latencies(phase).values())])
    return rows


def _rate(timing: Timing, phase: Phase) -> str:
    rate = timing.rate(phase)
    return f"{rate:.1f}" if rate < 1e4 else f"{rate:.0f}"


def _memory_line(speed: Speed) -> str:
    def compared(own: int, other: int | None) -> str:
        return size_text(own) + ("" if other is None else f" (baseline {size_text(other)})")

    weights = compared(speed.weight_bytes, speed.baseline_weight_bytes)
    largest = speed.speeds[-1]
    other = largest.baseline.peak_memory if largest.baseline else None
    peak = compared(largest.own.peak_memory, other)
    return f"Weights {weights}; peak memory at batch {largest.batch}: {peak}."


def _verdict(speed: Speed) -> Text:
    slow = speed.not_faster()
    if not slow:
        return Text("Faster than the baseline at every batch size, in every repetition.", "green")
    return Text(f"Not faster than the baseline: {', '.join(slow)}.", "yellow")
