"""Selects and loads the text that a recovery trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hisvd_cli.calibration.text.self_text import sample_self
from hisvd_cli.finetuning.recover import Classroom
from hisvd_cli.finetuning.training_data import Lessons, load_lessons, windows_of
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
    """Return which text the settings name, if any."""
    named = (resolved.settings.recover.dataset, resolved.settings.calibration.dataset)
    return next((name for name in named if name != "auto"), None)


def text_of(resolved: Resolved, checkpoint: Checkpoint) -> str:
    """Return which text: as named, else that of the calibration, else the model's own default."""
    if named := named_text(resolved):
        return named
    data = part(part(checkpoint.provenance, "calibration"), "data")
    made = str(part(checkpoint.provenance, "model").get("name"))
    return str(data.get("dataset") or default_dataset(Source(made, checkpoint.folder)))


def reads_the_same(resolved: Resolved, dense: Source, record: Mapping[str, Any]) -> bool:
    """Tell whether the text that the settings name is that of the recovery in a checkpoint's
    ``record``: what a file holds may have changed. Only files are read.

    Raises:
        DataError: see :func:`hisvd_cli.finetuning.training_data.load_lessons`.
    """
    dataset = named_text(resolved) or SELF
    if dataset == SELF or not expanded(dataset).is_file():
        return True
    data = part(part(record, "calibration"), "data")
    calibrated = resolved.settings.calibration.drop or str(data.get("drop", ""))
    trained = part(part(record, "recovery"), "data")
    return bool(load_text_of(dataset, dense, resolved, calibrated).key == trained.get("sha256"))


def training_windows(
    resolved: Resolved,
    checkpoint: Checkpoint,
    student: Source,
    teacher: Source | None,
    room: Classroom,
    reporter: Reporter,
) -> Lessons:
    knobs = resolved.settings.recover
    dataset = text_of(resolved, checkpoint)
    if dataset == SELF and teacher is not None:
        drawn = sample_self(
            teacher,
            knobs.samples or _SELF_WINDOWS,
            knobs.seqlen,
            knobs.seed,
            device=room.device,
            dtype=room.dtype,
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


def load_text_of(dataset: str, source: Source, resolved: Resolved, calibrated: str) -> Lessons:
    """Load a text; ``calibrated`` is what the calibration left out of its own."""
    knobs = resolved.settings.recover
    drop = calibrated if knobs.drop is None else knobs.drop
    return load_lessons(dataset, source, knobs.seqlen, drop)


def limited(lessons: Lessons, resolved: Resolved) -> Lessons:
    """Return the lessons that were asked for. Raises DataError: too few."""
    wanted = resolved.settings.recover.samples or len(lessons.ids)
    lessons = lessons.rows(0, wanted)
    lessons.held_out()
    return lessons
