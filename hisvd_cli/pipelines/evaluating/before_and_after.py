"""Perplexity of a model before and after compression."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.calibration.text.datasets import Text
from hisvd_cli.evaluation.perplexity import PerplexityResult, evaluation_windows, result_of
from hisvd_cli.export.card_results import update_card
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.cards import perplexity_results
from hisvd_cli.pipelines.evaluating.measuring import TextRunner
from hisvd_cli.pipelines.evaluating.targets import open_target
from hisvd_cli.pipelines.evaluating.texts import pick_texts
from hisvd_cli.pipelines.samples import default_dataset, window_length
from hisvd_cli.utils.progress import Reporter


def evaluation_text(resolved: Resolved, source: Source) -> Text | None:
    """Return the text to evaluate on before and after compression, None without evaluation.

    Raises:
        DataError: the text is empty, too short, or unavailable.
    """
    if not evaluates(resolved, source):
        return None
    text = pick_texts(resolved, [source])[0]
    settings = resolved.settings.eval
    length = window_length(settings.seqlen, source, "eval.seqlen")
    # Raises DataError if the text is too short, before the compression.
    evaluation_windows(text, source, length, settings.windows)
    return text


def evaluates(resolved: Resolved, source: Source) -> bool:
    """Return whether a compression evaluates the model; by default only the demo model."""
    wanted = resolved.settings.compress.evaluate
    return default_dataset(source) == source.name if wanted is None else wanted


def before_and_after(
    resolved: Resolved, source: Source, path: Path, text: Text | None, reporter: Reporter
) -> tuple[PerplexityResult, PerplexityResult] | None:
    """Return the perplexity of a model and of its checkpoint, and write it to the model card; None
    without a text."""
    if text is None:
        return None
    before = _perplexity(resolved, source, text, reporter)
    with open_target(resolved, str(path)) as made:
        after = _perplexity(resolved, made, text, reporter)
    if path.is_dir():  # the card in a .pt file cannot be changed
        update_card(path, perplexity_results([after], [before]))
    return before, after


def _perplexity(
    resolved: Resolved, source: Source, text: Text, reporter: Reporter
) -> PerplexityResult:
    seqlen = window_length(resolved.settings.eval.seqlen, source, "eval.seqlen")
    found = TextRunner(resolved, [text], seqlen, reporter).measure(source)[0]
    return result_of(found.windows, found.sums, found.dtype)
