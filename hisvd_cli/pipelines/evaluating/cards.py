"""Writes evaluation results to the model cards of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hisvd_cli.evaluation.grid import Evaluation, Grid
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.zero_shot import Score
from hisvd_cli.export.card_results import CardResult, check_card, update_card
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint
from hisvd_cli.utils.files.fingerprints import expanded


def check_cards(targets: Sequence[str]) -> None:
    """Check before any work that the card of each checkpoint folder can be updated.

    Raises:
        SourceError: see :func:`check_card`.
    """
    for folder in map(expanded, filter(None, targets)):
        if folder.is_dir() and is_checkpoint(folder):
            check_card(folder)


def update_cards(grid: Grid) -> list[Path]:
    """Write the results to the card of each model that is a checkpoint folder; return the
    folders.

    Raises:
        SourceError: a checkpoint has no card, or a damaged one.
        OutputError: a card cannot be written.
    """
    updated = []
    for each in grid.evaluations:
        folder = expanded(each.model)
        if folder.is_dir() and is_checkpoint(folder):
            update_card(folder, _results(each, grid.baseline))
            updated.append(folder)
    return updated


def perplexity_results(
    after: Sequence[PerplexityResult], before: Sequence[PerplexityResult] | None = None
) -> list[CardResult]:
    """Return perplexities as results for a card, with those of the dense model."""
    return [
        CardResult(
            dataset=result.dataset,
            metric="perplexity",
            value=result.perplexity,
            split=result.split,
            dense=before[i].perplexity if before else None,
            details={
                "windows": result.windows,
                "seqlen": result.seqlen,
                "bos": result.bos,
                "text_sha256": result.dataset_hash,
            },
        )
        for i, result in enumerate(after)
    ]


def _results(evaluation: Evaluation, baseline: Evaluation | None) -> list[CardResult]:
    before = baseline.results if baseline else None
    dense = _by_question(baseline.scores or []) if baseline else {}
    scores = [
        CardResult(
            dataset=score.task,
            metric=score.metric,
            value=score.value,
            dense=dense.get((score.task, score.metric, score.filter)),
            details=_details(score),
        )
        for score in evaluation.scores or []
    ]
    return perplexity_results(evaluation.results, before) + scores


def _by_question(scores: Sequence[Score]) -> dict[tuple[str, str, str], float | None]:
    return {(each.task, each.metric, each.filter): each.value for each in scores}


def _details(score: Score) -> dict[str, str | int | float]:
    known = {
        "filter": score.filter,
        "num_fewshot": score.num_fewshot,
        "questions": score.questions,
        "stderr": score.stderr,
        "task_version": score.version,
    }
    return {name: value for name, value in known.items() if value is not None}
