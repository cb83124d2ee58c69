"""One run's evaluations: models on texts, side by side, with what failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hisvd_cli.evaluation.perplexity import Comparison, PerplexityResult
from hisvd_cli.evaluation.speed import Speed
from hisvd_cli.evaluation.zero_shot import Score


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        model: as the user named it.
        results: one for each text.
        comparisons: with the baseline.
        scores: in lm-eval's tasks, where some were asked for.
        speed: beside the baseline's, where it was asked for.
    """

    model: str
    results: list[PerplexityResult]
    comparisons: list[Comparison] = field(default_factory=list)
    scores: list[Score] | None = None
    speed: Speed | None = None

    def document(self, baseline: Evaluation | None = None) -> dict[str, Any]:
        """Return the evaluation as JSON data, the baseline's results beside it."""
        return {
            "model": self.model,
            "results": [result.document() for result in self.results],
            "baseline": baseline.beside() if baseline else None,
            "comparisons": [each.document() for each in self.comparisons],
            "efficiency": self.speed.document() if self.speed else None,
            "tasks": self._tasks(),
        }

    def beside(self) -> dict[str, Any]:
        """Return model, results and tasks alone, as JSON data."""
        return {
            "model": self.model,
            "results": [result.document() for result in self.results],
            "tasks": self._tasks(),
        }

    def _tasks(self) -> list[dict[str, Any]] | None:
        return None if self.scores is None else [each.document() for each in self.scores]


@dataclass(frozen=True)
class Failure:
    """A model that could not be evaluated, and why."""

    model: str
    message: str
    hint: str


@dataclass(frozen=True)
class Grid:
    """What one run measured.

    Attributes:
        evaluations: of each model, in the order in which they were named.
        baseline: what they were held against.
        comparisons: of each two models; those with the baseline are in the evaluations.
        failures: models that could not be evaluated.
        single: whether one model was asked for: its document then stands alone.
    """

    evaluations: list[Evaluation]
    baseline: Evaluation | None
    comparisons: list[Comparison]
    failures: list[Failure]
    single: bool = False

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data: of one model its own document, of several a list."""
        if self.single:
            return self.evaluations[0].document(self.baseline)
        return {
            "evaluations": [each.document(self.baseline) for each in self.evaluations],
            "baseline": self.baseline.beside() if self.baseline else None,
            "comparisons": [each.document() for each in self.comparisons],
            "failures": [{"model": each.model, "message": each.message} for each in self.failures],
        }

    def rows(self) -> Sequence[Evaluation]:
        """Return the baseline, if there is one, and all models."""
        return [*([self.baseline] if self.baseline else []), *self.evaluations]

    def line(self) -> str:
        """Return the perplexities in one line, model after model."""
        results = [result for each in self.evaluations for result in each.results]
        return " ".join(
            "non-finite" if r.perplexity is None else f"{r.perplexity:.4f}" for r in results
        )
