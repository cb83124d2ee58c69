"""Settings ─► perplexities of a model, and of a baseline beside it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hisvd_cli.build.calibration import default_dataset, stored_dtype, window_length
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
    baseline = resolved.settings.eval.baseline
    source = open_source(baseline) if baseline else None
    results = measure(resolved, target, reporter, dataset_of=source)
    if source is None:
        return Evaluation(target, results)
    beside = measure(resolved, source.name, reporter, source=source)
    return Evaluation(target, results, source.name, beside)


def measure(
    resolved: Resolved,
    target: str,
    reporter: Reporter,
    source: Source | None = None,
    dataset_of: Source | None = None,
) -> list[PerplexityResult]:
    """Measure the perplexity of ``target`` on each text of the settings.

    Args:
        resolved: the settings.
        target: folder, ``.pt`` file, or any model name.
        reporter: told of progress.
        source: ``target`` where it is open already.
        dataset_of: the model whose default text is used where the settings name none.
    """
    with tempfile.TemporaryDirectory(prefix="hisvd-") as scratch:
        opened = source or _open(resolved, target, Path(scratch) / "unpacked")
        texts = _texts(resolved, dataset_of or opened, opened)
        settings = resolved.settings.eval
        seqlen = window_length(settings.seqlen, opened)
        device = pick_device(resolved.settings.model.device)
        dtype = pick_dtype(resolved.settings.model.dtype, stored_dtype(opened), device)
        model = load_model(opened.folder, device, dtype, opened.trust_remote_code)
        return [
            perplexity(
                model,
                opened,
                text,
                seqlen=seqlen,
                windows=settings.windows,
                batch=settings.batch,
                reporter=reporter,
            )
            for text in texts
        ]


def _open(resolved: Resolved, target: str, scratch: Path) -> Source:
    path = Path(target).expanduser()
    if path.is_file() and path.suffix == ".pt":
        return Source(target, unpacked(path, scratch))
    model = resolved.settings.model
    return open_source(target, model.revision, model.trust_remote_code)


def _texts(resolved: Resolved, chooser: Source, source: Source) -> list[Text]:
    fallback = default_dataset(chooser)
    if is_checkpoint(source.folder) and _base_model(source) == DEMO:
        fallback = DEMO
    texts = [load_text(name, "evaluation") for name in resolved.settings.eval.dataset or [fallback]]
    for text in texts:
        _refuse_calibration_text(text, source)
    return texts


def _base_model(source: Source) -> str | None:
    name: str | None = open_checkpoint(source.folder).provenance.get("model", {}).get("name")
    return name


def _refuse_calibration_text(text: Text, source: Source) -> None:
    if not is_checkpoint(source.folder):
        return
    manifest = open_checkpoint(source.folder).provenance.get("calibration") or {}
    if manifest.get("data", {}).get("text_sha256") == text.digest:
        raise DataError(
            f"{source.name} was calibrated on '{text.name}' itself: its perplexity there says "
            "nothing.",
            "Evaluate on another text or split.",
        )
