"""Tables of tasks and speeds for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hisvd_cli.evaluation.efficiency import PERCENTILES, PHASES, Phase
from hisvd_cli.evaluation.grid import Evaluation
from hisvd_cli.evaluation.speed import BatchSpeed, Speed
from hisvd_cli.evaluation.zero_shot import Score


@dataclass(frozen=True)
class Number:
    """A table cell: its text, a small second line, and the value to sort by."""

    text: str
    bounds: str = ""
    value: float | None = None


NOTHING = Number("–")


def task_rows(rows: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Return a row for each task and metric with the score of each model, if it was measured."""
    found = [{(s.task, s.measure): s for s in row.scores or ()} for row in rows]
    return [
        {
            "task": key[0],
            "metric": key[1],
            "scores": [_score(each.get(key)) for each in found],
        }
        for key in dict.fromkeys(key for each in found for key in each)
    ]


def _score(score: Score | None) -> Number:
    if score is None:
        return NOTHING
    if score.value is None:
        return Number("not finite")
    error = "" if score.stderr is None else f"± {score.stderr:.4f}"
    return Number(f"{score.value:.4f}", error, score.value)


@dataclass(frozen=True)
class SpeedTable:
    """The speeds of models.

    Attributes:
        conditions: the distinct conditions of the measurements.
        columns: headings of the columns after model, batch and phase.
        rows: model, batch, phase, figures.
        slow: model, and the phases and batch sizes at which it is not faster than the baseline.
    """

    conditions: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[tuple[str, int, str, Sequence[Number]]]
    slow: Sequence[tuple[str, Sequence[str]]]


def speed_table(rows: Sequence[Evaluation]) -> SpeedTable | None:
    """Return the speeds of all models that were timed; None if there are none."""
    timed = [(row.model, row.speed) for row in rows if row.speed is not None]
    if not timed:
        return None
    compared = any(at_batch.baseline for _, speed in timed for at_batch in speed.speeds)
    columns = ["tokens/s", *(["baseline", "speed"] if compared else [])]
    columns += [*(f"p{p} ms" for p in PERCENTILES), "peak MB"]
    return SpeedTable(
        list(dict.fromkeys(speed.conditions for _, speed in timed)),
        columns,
        [line for model, speed in timed for line in _lines(model, speed, compared)],
        [(model, slow) for model, speed in timed if (slow := speed.not_faster())],
    )


def _lines(
    model: str, speed: Speed, compared: bool
) -> Iterator[tuple[str, int, str, Sequence[Number]]]:
    for at_batch in speed.speeds:
        for phase in PHASES:
            yield model, at_batch.batch, phase, _figures(at_batch, phase, compared)


def _figures(at_batch: BatchSpeed, phase: Phase, compared: bool) -> list[Number]:
    cells = [_plain(at_batch.own.rate(phase))]
    if compared and at_batch.baseline is not None:
        each = at_batch.versus()[phase]
        cells.append(_plain(at_batch.baseline.rate(phase)))
        cells.append(Number(f"{each.speedup:.2f} ×", each.verdict, each.speedup))
    elif compared:
        cells += [NOTHING, NOTHING]
    cells += [_plain(1000 * seconds) for seconds in at_batch.own.latencies(phase).values()]
    return [*cells, _plain(at_batch.own.peak_memory / 1e6)]


def _plain(value: float) -> Number:
    return Number(f"{value:,.0f}" if value >= 1e3 else f"{value:#.4g}", "", value)
