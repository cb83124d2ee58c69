"""Results of ``evaluate`` and ``inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hisvd_cli.evaluation.efficiency import PHASES
from hisvd_cli.evaluation.grid import Evaluation as Evaluated
from hisvd_cli.evaluation.grid import Failure, Grid
from hisvd_cli.evaluation.report.tables import speed_table
from hisvd_cli.evaluation.report_tables import FIGURES, figure_text
from hisvd_cli.evaluation.speed import BatchSpeed
from hisvd_cli.inspection.audit import Audit as AuditData
from hisvd_cli.pipelines.api import display

_MAX_PROBLEMS = 20


@dataclass(frozen=True, repr=False)
class Evaluation(display.Result):
    """Results of evaluated models.

    Attributes:
        grid: all figures, with intervals and comparisons.
    """

    grid: Grid

    @property
    def perplexity(self) -> dict[str, float | None]:
        """Model → perplexity on the first text; None if it is not finite."""
        return {each.model: each.results[0].perplexity for each in self.grid.evaluations}

    @property
    def baseline(self) -> Evaluated | None:
        """Results of the baseline."""
        return self.grid.baseline

    @property
    def failures(self) -> list[Failure]:
        """Models that could not be evaluated, with errors."""
        return self.grid.failures

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return self.grid.document()

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for model in self.grid.rows():
            for found in model.results:
                cells = (figure_text(found, name, form) for name, (_, form) in FIGURES.items())
                yield (model.model, f"{found.dataset} ({found.split})", *cells)

    def _facts(self) -> dict[str, object]:
        found: dict[str, object] = {
            f"{model}, {text}": f"perplexity {perplexity}"
            for model, text, perplexity, *_ in self._rows()
        }
        found |= {
            f"{model.model}, batch {at_batch.batch}": _rates(at_batch)
            for model in self.grid.rows()
            for at_batch in (model.speed.speeds if model.speed else ())
        }
        return found | {f"{each.model} failed": each.message for each in self.failures}

    def _tables(self) -> Sequence[str]:
        columns = ("model", "text", *(title for title, _ in FIGURES.values()))
        scores = [
            (model.model, each.task, each.metric, each.value)
            for model in self.grid.rows()
            for each in model.scores or ()
        ]
        tasks = [display.table(("model", "task", "metric", "value"), scores)] if scores else []
        return [display.table(columns, self._rows()), *tasks, *_speeds(self.grid)]


def _rates(at_batch: BatchSpeed) -> str:
    compared = at_batch.versus()
    rates = (
        f"{phase} {at_batch.own.rate(phase):.4g} tokens/s"
        + (f" ({compared[phase].speedup:.2f} × the baseline)" if compared else "")
        for phase in PHASES
    )
    return ", ".join(rates)


def _speeds(grid: Grid) -> Iterator[str]:
    """Yield the table of speeds, with their conditions, if speed was measured."""
    if made := speed_table(grid.rows()):
        rows = (
            (model, batch, phase, *(f"{n.text} {n.bounds}".strip() for n in numbers))
            for model, batch, phase, numbers in made.rows
        )
        columns = ("model", "batch", "phase", *made.columns)
        yield display.table(columns, rows, f"Speed: {', '.join(made.conditions)}")


@dataclass(frozen=True, repr=False)
class Audit(display.Result):
    """The findings of ``inspect``.

    Attributes:
        data: all findings.
    """

    data: AuditData

    @property
    def problems(self) -> list[str]:
        """The problems, one line each."""
        return self.data.problems

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return self.data.document()

    def _facts(self) -> dict[str, object]:
        data = self.data
        found: dict[str, object] = {"kind": data.kind, "target": data.target, **data.table}
        if data.model_ratio is not None:
            found["kept"] = f"{data.model_ratio:.2%} of the model"
        return {**found, "size": f"{data.bytes:,} bytes", "problems": len(data.problems)}

    def _tables(self) -> Sequence[str]:
        if not self.problems:
            return ()
        return [display.table(["problem"], ([line] for line in self.problems[:_MAX_PROBLEMS]))]
