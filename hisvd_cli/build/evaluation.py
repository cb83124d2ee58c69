"""Settings ─► perplexities of a model, and of a baseline beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hisvd_cli.audit import part
from hisvd_cli.build.samples import default_dataset, stored_dtype, window_length
from hisvd_cli.checkpoint import is_checkpoint, load_model, open_checkpoint
from hisvd_cli.convert import unpacked
from hisvd_cli.data import Text, load_text
from hisvd_cli.device import pick_device, pick_dtype
from hisvd_cli.errors import DataError, UsageError
from hisvd_cli.evaluate import PerplexityResult, perplexity
from hisvd_cli.profile import Resolved
from hisvd_cli.reporter import Reporter
from hisvd_cli.source import DEMO, Source, open_source


@dataclass(frozen=True)
class Evaluation:
    """Perplexities of a model, and of its baseline where one was named."""

    model: str
    results: list[PerplexityResult]
    baseline_model: str | None = None
    baseline: list[PerplexityResult] | None = None

    def document(self) -> dict[str, Any]:
        """Return the evaluation as JSON data."""
        baseline = None
        if self.baseline is not None:
            rows = [result.document() for result in self.baseline]
            baseline = {"model": self.baseline_model, "results": rows}
        return {
            "model": self.model,
            "results": [result.document() for result in self.results],
            "baseline": baseline,
            "efficiency": None,
            "tasks": None,
        }

    def line(self) -> str:
        """Return the perplexities in one line."""
        return " ".join(
            "non-finite" if r.perplexity is None else f"{r.perplexity:.4f}" for r in self.results
        )


def evaluate_model(resolved: Resolved, target: str, reporter: Reporter) -> Evaluation:
    """Measure a model, and the baseline of the settings beside it.

    Raises:
        UsageError: no model is named.
        DataError: the text is that of the calibration, empty, or too short.
    """
    if not target:
        raise UsageError("No model is named.", "Name a checkpoint folder or a model.")
    named = resolved.settings.eval.baseline
    baseline = open_source(named, compressible=False) if named else None
    with open_target(resolved, target) as source:
        texts = pick_texts(resolved, source, baseline)
        check_texts(texts, calibration_of(source), target)
        # Both in windows of one length, or their perplexities could not be compared.
        models = [source] if baseline is None else [source, baseline]
        seqlen = min(window_length(resolved.settings.eval.seqlen, model) for model in models)
        results = measure(resolved, source, texts, reporter, seqlen)
    if baseline is None:
        return Evaluation(target, results)
    beside = measure(resolved, baseline, texts, reporter, seqlen)
    return Evaluation(target, results, baseline.name, beside)


@contextmanager
def open_target(resolved: Resolved, target: str) -> Iterator[Source]:
    """Open a model, a checkpoint folder, or a ``.pt`` file (unpacked while the body runs)."""
    path = Path(target).expanduser()
    if path.is_file() and path.suffix == ".pt":
        with tempfile.TemporaryDirectory(prefix="hisvd-") as scratch:
            yield Source(target, unpacked(path, Path(scratch) / "unpacked"))
    else:
        model = resolved.settings.model
        yield open_source(target, model.revision, model.trust_remote_code, compressible=False)


def pick_texts(resolved: Resolved, source: Source, baseline: Source | None = None) -> list[Text]:
    """Load the texts of the settings; where they name none, the default of the model."""
    fallback = DEMO if _is_demo(source) or (baseline and _is_demo(baseline)) else None
    names = resolved.settings.eval.dataset or [fallback or default_dataset(source)]
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
                f"{model} is calibrated on '{text.name}' itself: its perplexity there says "
                "nothing.",
                "Evaluate on another text or split.",
            )


def measure(
    resolved: Resolved,
    source: Source,
    texts: Sequence[Text],
    reporter: Reporter,
    seqlen: int | None = None,
) -> list[PerplexityResult]:
    """Measure the perplexity of a model on each text.

    Args:
        resolved: the settings.
        source: the model.
        texts: what it is measured on.
        reporter: told of progress.
        seqlen: tokens per window; by default that of the settings.
    """
    settings = resolved.settings.eval
    device = pick_device(resolved.settings.model.device)
    dtype = pick_dtype(resolved.settings.model.dtype, stored_dtype(source), device)
    length = seqlen or window_length(settings.seqlen, source)
    model = load_model(source.folder, device, dtype, source.trust_remote_code)
    return [
        perplexity(
            model,
            source,
            text,
            seqlen=length,
            windows=settings.windows,
            batch=settings.batch,
            reporter=reporter,
        )
        for text in texts
    ]
