"""Evaluates models on texts and compares them with a baseline; reuses stored results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations

from hisvd_cli.evaluation.grid import Evaluation, Failure, Grid
from hisvd_cli.evaluation.perplexity import Comparison, PerplexityResult, compare, result_of
from hisvd_cli.evaluation.speed import Speed
from hisvd_cli.evaluation.zero_shot import Score
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.efficiency import SpeedRunner
from hisvd_cli.pipelines.evaluating.failures import recorded_failure
from hisvd_cli.pipelines.evaluating.measuring import Measured, TextRunner
from hisvd_cli.pipelines.evaluating.targets import calibration_of, open_baseline, open_reported
from hisvd_cli.pipelines.evaluating.tasks import TaskRunner
from hisvd_cli.pipelines.evaluating.texts import check_texts, pick_texts
from hisvd_cli.pipelines.samples import window_length
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.progress import Reporter

_MEMORY_HINT = "Give `eval.stream` on, or lower `eval.batch`."


def evaluate_models(
    resolved: Resolved, targets: Sequence[str], reporter: Reporter, fresh: bool = False
) -> Grid:
    """Evaluate models and compare them with the baseline of the settings.

    All models get windows of the same length, the longest that all have positions for. If one of
    several models fails, the others are still evaluated.

    Args:
        resolved: the settings.
        targets: checkpoint folders, ``.pt`` files, or any models.
        reporter: receives progress.
        fresh: ignore stored results.

    Raises:
        UsageError: no model is named.
        DataError: a text is empty, too short, or unavailable.
        HisvdError: the baseline, or the only model, cannot be evaluated.
    """
    if not targets or not all(targets):
        raise UsageError("No model is named.", "Name a checkpoint folder or a model.")
    baseline = open_baseline(resolved, reporter)
    failures: list[Failure] = []
    with ExitStack() as stack:
        sources: list[tuple[str, Source]] = []
        for target in targets:
            with recorded_failure(target, failures, len(targets) == 1, _MEMORY_HINT):
                source = stack.enter_context(open_reported(resolved, target, reporter))
                _length(resolved, source)
                sources.append((target, source))
        grid = Grid([], None, [], failures, len(targets) == 1)
        return _fill(grid, resolved, sources, baseline, reporter, fresh) if sources else grid


def _fill(
    grid: Grid,
    resolved: Resolved,
    sources: Sequence[tuple[str, Source]],
    baseline: Source | None,
    reporter: Reporter,
    fresh: bool,
) -> Grid:
    """Return the grid with all results of ``sources`` and of the baseline."""
    every = [source for _, source in sources] + ([baseline] if baseline else [])
    texts = pick_texts(resolved, every)
    # Perplexities compare only for windows of the same length.
    seqlen = min(_length(resolved, source) for source in every)
    perplexity = TextRunner(resolved, texts, seqlen, reporter, fresh)
    speed = SpeedRunner(resolved, every, baseline, reporter)
    tasks = TaskRunner(resolved, reporter, fresh)
    cells: dict[str, list[Measured]] = {}
    more: dict[str, tuple[list[Score] | None, Speed | None]] = {}
    with perplexity.against(baseline):
        for target, source in sources:
            with recorded_failure(target, grid.failures, grid.single, _MEMORY_HINT):
                check_texts(texts, calibration_of(source), target)
                cell = perplexity.measure(source)
                more[target] = tasks.scores(source), speed.time(source)
                cells[target] = cell
        beside = perplexity.baseline()
    dense = baseline.name if baseline else ""
    return Grid(
        [
            Evaluation(
                target,
                _results(cell),
                _comparisons((target, cell), (dense, beside)),
                *more[target],
            )
            for target, cell in cells.items()
        ],
        Evaluation(dense, _results(beside), [], tasks.scores(baseline)) if baseline else None,
        [each for pair in combinations(cells.items(), 2) for each in _comparisons(*pair)],
        grid.failures,
        grid.single,
    )


def _length(resolved: Resolved, source: Source) -> int:
    return window_length(resolved.settings.eval.seqlen, source, "eval.seqlen")


def _results(cell: Sequence[Measured]) -> list[PerplexityResult]:
    return [result_of(each.windows, each.sums, each.dtype) for each in cell]


def _comparisons(
    one: tuple[str, Sequence[Measured]], other: tuple[str, Sequence[Measured]]
) -> list[Comparison]:
    """Compare two models on all texts that both split into the same tokens."""
    return [
        each
        for a, b in zip(one[1], other[1], strict=False)
        if a.windows.key == b.windows.key
        for each in compare(a.windows, (one[0], a.sums), (other[0], b.sums))
    ]
