"""Selects and loads the training text of a recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hisvd_cli.calibration.text.self_text import sample_self
from hisvd_cli.finetuning.factor_training import RunOptions
from hisvd_cli.finetuning.training_data import TrainingData, load_training_data, windows_of
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.samples import SELF, default_dataset, located
from hisvd_cli.utils.errors import StaleArtifactError
from hisvd_cli.utils.files.fingerprints import digest, expanded
from hisvd_cli.utils.progress import Reporter

_SELF_WINDOWS = 256


def named_text(resolved: Resolved) -> str | None:
    """Return the name of the text in the settings, if any."""
    named = (resolved.settings.recover.dataset, resolved.settings.calibration.dataset)
    return next((name for name in named if name != "auto"), None)


def text_of(resolved: Resolved, checkpoint: Checkpoint) -> str:
    """Return the name of the text: of the settings, the calibration, or the model's default."""
    if named := named_text(resolved):
        return named
    data = part(part(checkpoint.provenance, "calibration"), "data")
    made = str(part(checkpoint.provenance, "model").get("name"))
    return str(data.get("dataset") or default_dataset(Source(made, checkpoint.folder)))


def is_same_text(resolved: Resolved, dense: Source, record: Mapping[str, Any]) -> bool:
    """Return whether the text of the settings is the training text in the provenance ``record``.
    The content of files is compared; other texts count as unchanged.

    Raises:
        DataError: see :func:`hisvd_cli.finetuning.training_data.load_training_data`.
    """
    dataset = named_text(resolved) or SELF
    if dataset == SELF or not expanded(dataset).is_file():
        return True
    data = part(part(record, "calibration"), "data")
    calibrated = resolved.settings.calibration.drop or str(data.get("drop", ""))
    trained = part(part(record, "recovery"), "data")
    return bool(load_text_of(dataset, dense, resolved, calibrated).key == trained.get("sha256"))


def is_same_recovery(resolved: Resolved, dense: Source, record: Mapping[str, Any]) -> bool:
    """Return whether the provenance ``record`` has the recovery of the settings, on the same text;
    without a recovery in the settings, whether it has none.

    Raises:
        DataError: see :func:`hisvd_cli.finetuning.training_data.load_training_data`.
    """
    trained = part(record, "recovery").get("settings")
    if resolved.settings.recover.method == "none":
        return trained is None
    wanted = resolved.recorded("model", "recover")
    return bool(trained == wanted) and is_same_text(resolved, dense, record)


def training_windows(
    resolved: Resolved,
    checkpoint: Checkpoint,
    student: Source,
    teacher: Source | None,
    run: RunOptions,
    reporter: Reporter,
) -> TrainingData:
    """Return the training windows of a checkpoint, sampled from the dense model or from a text.

    Raises:
        StaleArtifactError: the text of the calibration is missing or has changed.
        DataError: the text is too short, or lacks a field.
    """
    knobs = resolved.settings.recover
    dataset = text_of(resolved, checkpoint)
    if dataset == SELF and teacher is not None:
        drawn = sample_self(
            teacher,
            knobs.samples or _SELF_WINDOWS,
            knobs.seqlen,
            knobs.seed,
            device=run.device,
            dtype=run.dtype,
            reporter=reporter,
        )
        return windows_of(drawn.flatten(), knobs.seqlen, SELF, digest(drawn.numpy().tobytes()))
    data = part(part(checkpoint.provenance, "calibration"), "data")
    calibrated = resolved.settings.calibration.drop or str(data.get("drop", ""))
    name: str | None = dataset
    if not named_text(resolved) and dataset == data.get("dataset"):
        name = located(data)
    if name is None:
        raise StaleArtifactError(
            f"The text '{dataset}' that {checkpoint.folder} was calibrated on is missing or has "
            "changed.",
            "Restore it, or name a text with `recover.dataset`.",
        )
    return limited(
        replace(load_text_of(name, student, resolved, calibrated), dataset=dataset), resolved
    )


def load_text_of(dataset: str, source: Source, resolved: Resolved, calibrated: str) -> TrainingData:
    """Load a text; ``calibrated`` is the string that the calibration removed from its text."""
    knobs = resolved.settings.recover
    drop = calibrated if knobs.drop is None else knobs.drop
    return load_training_data(dataset, source, knobs.seqlen, drop)


def limited(loaded: TrainingData, resolved: Resolved) -> TrainingData:
    """Return the requested number of windows. Raises DataError: there are too few."""
    wanted = resolved.settings.recover.samples or len(loaded.ids)
    loaded = loaded.rows(0, wanted)
    loaded.held_out()
    return loaded
