"""Opens the models to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hisvd_cli.export.convert import unpacked
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint, open_checkpoint
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import DEMO, Source
from hisvd_cli.modeling.structure.tensors import tell_notes
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.utils.files.fingerprints import expanded
from hisvd_cli.utils.files.scratch import scratch_folder
from hisvd_cli.utils.progress import Reporter


def open_baseline(resolved: Resolved, reporter: Reporter) -> Source | None:
    """Open the baseline of the settings, if they name one, and report notes about it."""
    named = resolved.settings.eval.baseline
    baseline = open_source(named, compressible=False) if named else None
    if baseline:
        tell_notes(baseline, reporter)
    return baseline


@contextmanager
def open_reported(resolved: Resolved, target: str, reporter: Reporter) -> Iterator[Source]:
    """Open a model as :func:`open_target`, and report notes about it."""
    with open_target(resolved, target) as source:
        tell_notes(source, reporter)
        yield source


@contextmanager
def open_target(resolved: Resolved, target: str) -> Iterator[Source]:
    """Open a model, a checkpoint folder, or a ``.pt`` file, unpacked while the body runs."""
    path = expanded(target)
    if path.is_file() and path.suffix == ".pt":
        with scratch_folder(resolved.settings.model.scratch) as scratch:
            yield Source(target, unpacked(path, scratch / "unpacked"))
    else:
        model = resolved.settings.model
        yield open_source(target, model.revision, model.trust_remote_code, compressible=False)


def is_demo(source: Source) -> bool:
    """Return whether a model is the demo model or was made from it."""
    if is_checkpoint(source.folder):
        made_from = part(open_checkpoint(source.folder).unchecked_provenance, "model")
        return bool(made_from.get("name") == DEMO)
    return source.name == DEMO


def calibration_of(source: Source) -> dict[str, Any]:
    """Return the manifest of the calibration that a checkpoint was made with, or an empty
    dictionary."""
    if not is_checkpoint(source.folder):
        return {}
    return part(open_checkpoint(source.folder).unchecked_provenance, "calibration")
