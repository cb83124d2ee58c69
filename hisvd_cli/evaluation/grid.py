"""Results of an evaluation run: every model on every text, comparisons and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hisvd_cli.evaluation.perplexity import Comparison, PerplexityResult
from hisvd_cli.evaluation.speed import Speed
from hisvd_cli.evaluation.zero_shot import Score


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    Attributes:
        model: the name that the user gave.
        results: one for each text.
        comparisons: with the baseline.
        scores: of lm-eval tasks; None if none were requested.
        speed: with that of the baseline; None if not requested.
    """

    model: str
    results: list[PerplexityResult]
    comparisons: list[Comparison] = field(default_factory=list)
    scores: list[Score] | None = None
    speed: Speed | None = None

    def document(self, baseline: Evaluation | None = None) -> dict[str, Any]:
        """Return the evaluation as JSON data, including the results of the baseline."""
        return {
            "model": self.model,
            "results": [result.document() for result in self.results],
            "baseline": baseline.baseline_document() if baseline else None,
            "comparisons": [each.document() for each in self.comparisons],
            "efficiency": self.speed.document() if self.speed else None,
            "tasks": self._tasks(),
        }

    def baseline_document(self) -> dict[str, Any]:
        """Return model, results and tasks as JSON data, for a baseline."""
        return {
            "model": self.model,
            "results": [result.document() for result in self.results],
            "tasks": self._tasks(),
        }

    def _tasks(self) -> list[dict[str, Any]] | None:
        return None if self.scores is None else [each.document() for each in self.scores]


@dataclass(frozen=True)
class Failure:
    """A model that could not be evaluated, and the error."""

    model: str
    message: str
    hint: str


@dataclass(frozen=True)
class Grid:
    """All results of one run.

    Attributes:
        evaluations: one for each model, in the given order.
        baseline: the evaluation of the baseline, if any.
        comparisons: between each pair of models; those with the baseline are in the evaluations.
        failures: models that could not be evaluated.
        single: whether exactly one model was requested: the JSON document is then its own.
    """

    evaluations: list[Evaluation]
    baseline: Evaluation | None
    comparisons: list[Comparison]
    failures: list[Failure]
    single: bool = False

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data: the document of a single model, or a list of several."""
        if self.single:
            return self.evaluations[0].document(self.baseline)
        return {
            "evaluations": [each.document(self.baseline) for each in self.evaluations],
            "baseline": self.baseline.baseline_document() if self.baseline else None,
            "comparisons": [each.document() for each in self.comparisons],
            "failures": [{"model": each.model, "message": each.message} for each in self.failures],
        }

    def rows(self) -> Sequence[Evaluation]:
        """Return the evaluations, the baseline first if there is one."""
        return [*([self.baseline] if self.baseline else []), *self.evaluations]

    def line(self) -> str:
        """Return the perplexities of all models in one line."""
        results = [result for each in self.evaluations for result in each.results]
        return " ".join(
            "non-finite" if r.perplexity is None else f"{r.perplexity:.4f}" for r in results
        )
