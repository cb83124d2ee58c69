"""Settings and a run's results ─► a report, with what the models' own files say."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.compression.stage_times import times_of
from hisvd_cli.evaluation.grid import Grid
from hisvd_cli.evaluation.report.content import ModelFacts, Report, Spectra
from hisvd_cli.evaluation.report.page import render
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, is_checkpoint, open_checkpoint
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.evaluation import open_target
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.fingerprints import cache_root
from hisvd_cli.utils.files.tensorfile import read_tensors
from hisvd_cli.utils.files.text_output import write_through
from hisvd_cli.utils.versions import versions


def write_report(resolved: Resolved, grid: Grid, path: Path) -> None:
    """Write the page of a run. Raises OutputError."""
    models = {each.model: _facts(resolved, each.model) for each in grid.rows()}
    report = Report(
        grid=grid,
        models=models,
        spectra=next(filter(None, map(_spectra, models.values())), None),
        settings=resolved.settings.model_dump(mode="json", include={"eval", "model"}),
        versions=versions(),
    )
    write_through(path, render(report))


def _facts(resolved: Resolved, model: str) -> ModelFacts:
    with open_target(resolved, model) as source:
        size = source.weights.total_bytes
        if not is_checkpoint(source.folder):
            return ModelFacts(model, size)
        file = source.folder / PLAN_FILE
        plan = load_plan(file) if file.is_file() else None
        record = open_checkpoint(source.folder).provenance
        return ModelFacts(model, size, plan, record, times_of(record))


def _spectra(facts: ModelFacts) -> Spectra | None:
    """Return the spectra that a checkpoint's plan looked at, or those of the weights, where they
    are in the cache."""
    fingerprint = part(facts.record, "model").get("fingerprint")
    key = part(facts.record, "calibration").get("key")
    if not isinstance(fingerprint, str):
        return None
    if isinstance(key, str):
        folder = cache_root() / "calibration"
        for path in sorted(folder.glob(f"*-{fingerprint[:12]}/*/spectra.safetensors")):
            if found := _read("whitened", path, key):
                return found
    path = cache_root() / "weights" / fingerprint / "spectra.safetensors"
    return _read("weight", path, fingerprint)


def _read(kind: str, path: Path, key: str) -> Spectra | None:
    try:
        tensors, metadata = read_tensors(path, "")
    except SourceError:  # absent, or damaged: the report does without
        return None
    if metadata.get("key") != key:
        return None
    return Spectra(kind, {name: tensor.tolist() for name, tensor in tensors.items()})
