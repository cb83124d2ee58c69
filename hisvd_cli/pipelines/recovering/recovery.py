"""Settings ─► a recovery that has been checked, with all that its training needs opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hisvd_cli.calibration.text.tokens import check_seqlen
from hisvd_cli.finetuning.adaptation import check_peft
from hisvd_cli.finetuning.recover import Classroom, check_teacher, check_trainable
from hisvd_cli.finetuning.training_data import Lessons
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.modeling.layers.lowrank import FACTORS
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import RecoverSettings
from hisvd_cli.pipelines.memory.whole_models import check_training, check_writing
from hisvd_cli.pipelines.recovering.texts import (
    limited,
    load_text_of,
    named_text,
    text_of,
    training_windows,
)
from hisvd_cli.pipelines.samples import SELF, stored_dtype
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.progress import Reporter

_TOGETHER = 2048  # tokens that go through the model at once


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


def wants_recovery(resolved: Resolved) -> bool:
    """Tell whether a short training was asked for."""
    return resolved.settings.recover.method != "none"


def check_recovery(resolved: Resolved, dense: Source) -> None:
    """Find out before a compression whether the recovery behind it can begin.

    Raises:
        UsageError: several processes, or a library is missing.
        DataError: the text is missing, too short, or lacks a field.
    """
    _check_knobs(resolved)
    check_seqlen(resolved.settings.recover.seqlen, dense)
    calibrated = resolved.settings.calibration
    # Where neither names a text, it is that of a calibration which may not be there yet.
    dataset = named_text(resolved) or SELF
    if dataset != SELF:
        limited(load_text_of(dataset, dense, resolved, calibrated.drop), resolved)
    teacher = dense if resolved.settings.recover.method == "distill" else None
    dtype = _dtype(resolved, stored_dtype(dense))
    check_training(resolved, (dense, teacher), dtype, tokens_together(resolved))
    if dataset == SELF:
        check_writing(resolved, dense, resolved.settings.recover.seqlen, f"--dataset {SELF}")


def check_trains(ranks: Mapping[str, int], resolved: Resolved) -> None:
    """Raise UsageError where no layer is low-rank, so that there is nothing to train."""
    if not ranks:
        raise UsageError(
            f"--recover {resolved.settings.recover.method} trains low-rank layers, and at this "
            "ratio every layer stays as it is.",
            "Lower --ratio, or leave out --recover.",
        )


def _check_knobs(resolved: Resolved) -> None:
    if world().size > 1:
        raise UsageError(
            "--recover runs in one process.",
            "Compress with several, and recover then: compress --from CHECKPOINT --recover.",
        )
    if resolved.settings.recover.method == "lora":
        check_peft()


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
        raise UsageError("Nothing is to be done to the checkpoint.", "Give --recover distill.")
    _check_knobs(resolved)
    checkpoint = open_checkpoint(folder)
    check_trains(checkpoint.ranks, resolved)
    check_trainable(checkpoint)
    student = Source(str(folder), folder)
    teacher = dense or _teacher(resolved, checkpoint)
    if teacher is not None:
        check_teacher(student, teacher)
    check_seqlen(knobs.seqlen, student)
    stored = student.weights.infos[f"{next(iter(checkpoint.ranks))}.weight"].dtype
    dtype = _dtype(resolved, stored)
    check_training(
        resolved, (student, teacher), dtype, tokens_together(resolved), _factors(checkpoint)
    )
    room = Classroom(pick_device(resolved.settings.model.device), dtype, knobs.checkpointing)
    lessons = training_windows(resolved, checkpoint, student, teacher, room, reporter)
    return Recovery(resolved, student, teacher, room, lessons)


def _dtype(resolved: Resolved, stored: str) -> torch.dtype:
    """Return the dtype that models run in."""
    device = pick_device(resolved.settings.model.device)
    dtype = pick_dtype(resolved.settings.model.dtype, stored, device)
    if dtype == torch.float16:  # whose gradients vanish
        return pick_dtype("auto", "bfloat16", device)
    return dtype


def tokens_together(resolved: Resolved) -> tuple[int, int]:
    """Return how many windows pass a model together, and the tokens in each."""
    seqlen = resolved.settings.recover.seqlen
    return max(_TOGETHER // seqlen, 1), seqlen


def _factors(checkpoint: Checkpoint) -> int:
    """Return the numbers in all low-rank factors of a checkpoint."""
    leaves = FACTORS[checkpoint.storage]
    shapes = [checkpoint.weights.infos[f"{n}.{x}"].shape for n in checkpoint.ranks for x in leaves]
    return sum(torch.Size(shape).numel() for shape in shapes)


def _teacher(resolved: Resolved, checkpoint: Checkpoint) -> Source | None:
    """Open the dense model: as --model names it, else as the provenance does."""
    knobs, model = resolved.settings.recover, resolved.settings.model
    if knobs.method == "lora" and text_of(resolved, checkpoint) != SELF:
        return None
    made = part(checkpoint.provenance, "model")
    name, revision = model.name or made.get("name"), model.revision or made.get("revision")
    if not name:
        raise SourceError(
            f"{checkpoint.folder} does not say which model it was made from.",
            "Name the dense model with --model.",
        )
    if model.name and not model.revision and model.name != made.get("name"):
        revision = None
    return open_source(str(name), revision, model.trust_remote_code)
