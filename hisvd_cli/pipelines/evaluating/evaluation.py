"""Settings ─► what models are on texts, and beside a baseline: measured once, kept, and reused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any

import torch

from hisvd_cli.calibration.text.datasets import Text, load_text
from hisvd_cli.evaluation.grid import Evaluation, Failure, Grid
from hisvd_cli.evaluation.perplexity import Comparison, PerplexityResult, compare, result_of
from hisvd_cli.evaluation.speed import Speed
from hisvd_cli.evaluation.zero_shot import Score
from hisvd_cli.export.convert import unpacked
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint, open_checkpoint
from hisvd_cli.modeling.skeleton import tell_notes
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import DEMO, Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.efficiency import Track
from hisvd_cli.pipelines.evaluating.measuring import Bench, Measured
from hisvd_cli.pipelines.evaluating.tasks import Examination
from hisvd_cli.pipelines.samples import default_dataset, window_length
from hisvd_cli.utils.errors import DataError, HisvdError, UsageError
from hisvd_cli.utils.files.fingerprints import expanded
from hisvd_cli.utils.files.scratch import scratch_folder
from hisvd_cli.utils.progress import Reporter

_MEMORY_HINT = "Give `eval.stream` on, or lower `eval.batch`."


def evaluate_models(
    resolved: Resolved, targets: Sequence[str], reporter: Reporter, fresh: bool = False
) -> Grid:
    """Measure models, and hold them against the baseline of the settings.

    All models get windows of one length, the longest that each has positions for. Of several
    models, one that fails leaves the others.

    Args:
        resolved: the settings.
        targets: checkpoint folders, ``.pt`` files, or any models.
        reporter: told of progress.
        fresh: measure again what was measured before.

    Raises:
        UsageError: no model is named.
        DataError: a text is empty, too short, or not to be had.
        HisvdError: the baseline, or the only model, cannot be evaluated.
    """
    if not targets or not all(targets):
        raise UsageError("No model is named.", "Name a checkpoint folder or a model.")
    named = resolved.settings.eval.baseline
    baseline = open_source(named, compressible=False) if named else None
    if baseline:
        tell_notes(baseline, reporter)
    failures: list[Failure] = []
    with ExitStack() as stack:
        sources: list[tuple[str, Source]] = []
        for target in targets:
            with tolerated(target, failures, len(targets) == 1):
                source = stack.enter_context(open_target(resolved, target))
                tell_notes(source, reporter)
                window_length(resolved.settings.eval.seqlen, source)
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
    """Return the grid with everything that can be measured of ``sources`` and the baseline."""
    every = [source for _, source in sources] + ([baseline] if baseline else [])
    texts = pick_texts(resolved, every)
    # Windows of one length for all, or their perplexities could not be compared.
    seqlen = min(window_length(resolved.settings.eval.seqlen, source) for source in every)
    bench = Bench(resolved, texts, seqlen, reporter, fresh)
    track = Track(resolved, every, baseline, reporter)
    exam = Examination(resolved, reporter, fresh)
    cells: dict[str, list[Measured]] = {}
    more: dict[str, tuple[list[Score] | None, Speed | None]] = {}
    with bench.beside(baseline):
        for target, source in sources:
            with tolerated(target, grid.failures, grid.single):
                check_texts(texts, calibration_of(source), target)
                cell = bench.measure(source)
                more[target] = exam.scores(source), track.time(source)
                cells[target] = cell
        beside = bench.baseline()
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
        Evaluation(dense, _results(beside), [], exam.scores(baseline)) if baseline else None,
        [each for pair in combinations(cells.items(), 2) for each in _comparisons(*pair)],
        grid.failures,
        grid.single,
    )


def _results(cell: Sequence[Measured]) -> list[PerplexityResult]:
    return [result_of(each.windows, each.sums, each.dtype) for each in cell]


def _comparisons(
    one: tuple[str, Sequence[Measured]], other: tuple[str, Sequence[Measured]]
) -> list[Comparison]:
    """Compare two models on all texts that they read into the same tokens."""
    return [
        each
        for a, b in zip(one[1], other[1], strict=False)
        if a.windows.key == b.windows.key
        for each in compare(a.windows, (one[0], a.sums), (other[0], b.sums))
    ]


@contextmanager
def tolerated(
    target: str, failures: list[Failure], alone: bool, memory_hint: str = _MEMORY_HINT
) -> Iterator[None]:
    """Note that a model failed in the body, and go on; where it is the only one, fail."""
    try:
        yield
    except HisvdError as error:
        if alone:
            raise
        failures.append(Failure(target, error.message, error.hint))
    except (MemoryError, torch.OutOfMemoryError):
        if alone:
            raise
        failures.append(Failure(target, "Out of memory.", memory_hint))


@contextmanager
def open_target(resolved: Resolved, target: str) -> Iterator[Source]:
    """Open a model, a checkpoint folder, or a ``.pt`` file (unpacked while the body runs)."""
    path = expanded(target)
    if path.is_file() and path.suffix == ".pt":
        with scratch_folder(resolved.settings.model.scratch) as scratch:
            yield Source(target, unpacked(path, scratch / "unpacked"))
    else:
        model = resolved.settings.model
        yield open_source(target, model.revision, model.trust_remote_code, compressible=False)


def pick_texts(resolved: Resolved, sources: Sequence[Source]) -> list[Text]:
    """Load the texts of the settings; where they name none, the default of the models."""
    fallback = DEMO if any(map(_is_demo, sources)) else default_dataset(sources[0])
    names = resolved.settings.eval.dataset or [fallback]
    return [load_text(name, "evaluation") for name in names]


def _is_demo(source: Source) -> bool:
    """Tell the demo model, and what was made from it."""
    if is_checkpoint(source.folder):
        made_from = part(open_checkpoint(source.folder).provenance, "model")
        return bool(made_from.get("name") == DEMO)
    return source.name == DEMO


def calibration_of(source: Source) -> dict[str, Any]:
    """Return the manifest of the calibration that a checkpoint was made with, or nothing."""
    if not is_checkpoint(source.folder):
        return {}
    return part(open_checkpoint(source.folder).provenance, "calibration")


def check_texts(texts: Sequence[Text], calibration: dict[str, Any], model: str) -> None:
    """Refuse a text that a model was calibrated on.

    Raises:
        DataError: one of ``texts`` is the text of ``calibration`` (a manifest).
    """
    for text in texts:
        if part(calibration, "data").get("text_sha256") == text.digest:
            raise DataError(
                f"{model} was calibrated on '{text.name}' itself, so its perplexity there is "
                "meaningless.",
                "Evaluate on another text or split.",
            )


def measure(
    resolved: Resolved, source: Source, texts: Sequence[Text], reporter: Reporter
) -> list[PerplexityResult]:
    """Measure a model by itself on each text."""
    seqlen = window_length(resolved.settings.eval.seqlen, source)
    return _results(Bench(resolved, texts, seqlen, reporter).measure(source))
