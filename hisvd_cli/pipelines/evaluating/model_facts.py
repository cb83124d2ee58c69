"""Collects what the files of evaluated models say, for the report."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.evaluation.report.content import ModelFacts, Spectra
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, is_checkpoint, open_checkpoint
from hisvd_cli.modeling.checkpoints.stage_times import times_of
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.targets import open_target
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.fingerprints import cache_root
from hisvd_cli.utils.files.tensorfile import read_tensors


def model_facts(resolved: Resolved, model: str) -> ModelFacts:
    """Return size, plan and provenance of a model."""
    with open_target(resolved, model) as source:
        size = source.weights.total_bytes
        if not is_checkpoint(source.folder):
            return ModelFacts(model, size)
        file = source.folder / PLAN_FILE
        plan = load_plan(file) if file.is_file() else None
        record = open_checkpoint(source.folder).provenance
        return ModelFacts(model, size, plan, record, times_of(record))


def cached_spectra(facts: ModelFacts) -> Spectra | None:
    """Return the spectra that a checkpoint's plan was based on, or else those of the weights, if
    they are in the cache."""
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
    except SourceError:  # missing or damaged: the report has no spectra then
        return None
    if metadata.get("key") != key:
        return None
    return Spectra(kind, {name: tensor.tolist() for name, tensor in tensors.items()})
