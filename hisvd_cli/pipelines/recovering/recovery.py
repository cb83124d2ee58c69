"""Settings ─► a checked recovery: models opened, text loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hisvd_cli.calibration.text.tokens import check_seqlen
from hisvd_cli.finetuning.recover import Classroom, check_teacher, check_trainable
from hisvd_cli.finetuning.training_data import Lessons
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.modeling.layers.lowrank import FACTORS
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import RecoverSettings
from hisvd_cli.pipelines.memory.whole_models import check_training
from hisvd_cli.pipelines.recovering.recovery_checks import (
    check_knobs,
    check_trains,
    tokens_together,
    training_dtype,
)
from hisvd_cli.pipelines.recovering.recovery_texts import text_of, training_windows
from hisvd_cli.pipelines.samples import SELF
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.progress import Reporter


@dataclass(frozen=True)
class Recovery:
    """A recovery that has been checked: all that can fail before its work has not.

    Attributes:
        student: the checkpoint.
        teacher: the dense model; None where none is needed.
        room: where models run.
    """

    resolved: Resolved
    student: Source
    teacher: Source | None
    room: Classroom
    lessons: Lessons

    @property
    def knobs(self) -> RecoverSettings:
        """The settings."""
        return self.resolved.settings.recover


def prepare_recovery(
    resolved: Resolved, folder: Path, reporter: Reporter, dense: Source | None = None
) -> Recovery:
    """Open everything that a recovery of a checkpoint needs.

    Args:
        resolved: the settings.
        folder: the checkpoint.
        reporter: told of text that is sampled.
        dense: the model that it was made from, where that is open.

    Raises:
        UsageError: no method, several processes, or a library is missing.
        SourceError: no checkpoint, one that cannot be trained, or a teacher that is missing or
            reads other tokens.
        DataError: the text is missing, too short, or lacks a field.
    """
    knobs = resolved.settings.recover
    if knobs.method == "none":
        raise UsageError(
            "Nothing is to be done with the checkpoint.", "Give `recover.method` distill."
        )
    check_knobs(resolved)
    checkpoint = open_checkpoint(folder)
    check_trains(checkpoint.ranks, resolved)
    check_trainable(checkpoint)
    student = Source(str(folder), folder)
    teacher = dense or _teacher(resolved, checkpoint)
    if teacher is not None:
        check_teacher(student, teacher)
    check_seqlen(knobs.seqlen, student, "`recover.seqlen`")
    stored = student.weights.infos[f"{next(iter(checkpoint.ranks))}.weight"].dtype
    dtype = training_dtype(resolved, stored)
    check_training(
        resolved, (student, teacher), dtype, tokens_together(resolved), _factors(checkpoint)
    )
    room = Classroom(pick_device(resolved.settings.model.device), dtype, knobs.checkpointing)
    lessons = training_windows(resolved, checkpoint, student, teacher, room, reporter)
    return Recovery(resolved, student, teacher, room, lessons)


def _factors(checkpoint: Checkpoint) -> int:
    """Return the numbers in all low-rank factors of a checkpoint."""
    leaves = FACTORS[checkpoint.storage]
    shapes = [checkpoint.weights.infos[f"{n}.{x}"].shape for n in checkpoint.ranks for x in leaves]
    return sum(torch.Size(shape).numel() for shape in shapes)


def _teacher(resolved: Resolved, checkpoint: Checkpoint) -> Source | None:
    """Open the dense model: as the settings name it, else as the provenance does."""
    knobs, model = resolved.settings.recover, resolved.settings.model
    if knobs.method == "lora" and text_of(resolved, checkpoint) != SELF:
        return None
    made = part(checkpoint.provenance, "model")
    name, revision = model.name or made.get("name"), model.revision or made.get("revision")
    if not name:
        raise SourceError(
            f"{checkpoint.folder} does not say which model it was made from.",
            "Name the dense model with `model.name`.",
        )
    if model.name and not model.revision and model.name != made.get("name"):
        revision = None
    return open_source(str(name), revision, model.trust_remote_code)
