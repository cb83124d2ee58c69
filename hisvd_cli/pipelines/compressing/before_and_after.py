"""Perplexity of a model before and after compression."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.calibration.text.datasets import Text
from hisvd_cli.evaluation.perplexity import PerplexityResult, evaluation_windows
from hisvd_cli.export.card_results import update_card
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.cards import perplexity_results
from hisvd_cli.pipelines.evaluating.evaluation import measure, open_target, pick_texts
from hisvd_cli.pipelines.samples import default_dataset, window_length
from hisvd_cli.utils.progress import Reporter


def evaluation_text(resolved: Resolved, source: Source) -> Text | None:
    """Return the text to measure before and after, read before the work; None for no measuring."""
    if not evaluates(resolved, source):
        return None
    text = pick_texts(resolved, [source])[0]
    settings = resolved.settings.eval
    # For the error that too short a text raises: now, not after the compression.
    evaluation_windows(text, source, window_length(settings.seqlen, source), settings.windows)
    return text


def evaluates(resolved: Resolved, source: Source) -> bool:
    wanted = resolved.settings.compress.evaluate
    return default_dataset(source) == source.name if wanted is None else wanted


def before_and_after(
    resolved: Resolved, source: Source, path: Path, text: Text | None, reporter: Reporter
) -> tuple[PerplexityResult, PerplexityResult] | None:
    if text is None:
        return None
    before = measure(resolved, source, [text], reporter)[0]
    with open_target(resolved, str(path)) as made:
        after = measure(resolved, made, [text], reporter)[0]
    if path.is_dir():  # the card inside a single file was written with it
        update_card(path, perplexity_results([after], [before]))
    return before, after
