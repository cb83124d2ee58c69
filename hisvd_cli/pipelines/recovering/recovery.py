"""Prepares a recovery: opens models, loads text, checks everything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hisvd_cli.calibration.text.tokens import check_seqlen
from hisvd_cli.finetuning.factor_training import RunOptions
from hisvd_cli.finetuning.recover import check_teacher, check_trainable
from hisvd_cli.finetuning.training_data import TrainingData
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import RecoverSettings
from hisvd_cli.pipelines.memory.whole_models import check_training
from hisvd_cli.pipelines.recovering.recovery_checks import (
    check_runs,
    check_trains,
    tokens_together,
    training_dtype,
)
from hisvd_cli.pipelines.recovering.recovery_texts import training_windows
from hisvd_cli.pipelines.recovering.teacher import open_teacher
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.progress import Reporter


@dataclass(frozen=True)
class Recovery:
    """A recovery that passed all checks.

    Attributes:
        resolved: the settings.
        student: the checkpoint.
        teacher: the dense model; None if the method needs none.
        run: device and dtype of the models.
        data: the training windows.
    """

    resolved: Resolved
    student: Source
    teacher: Source | None
    run: RunOptions
    data: TrainingData

    @property
    def knobs(self) -> RecoverSettings:
        """The settings."""
        return self.resolved.settings.recover


def prepare_recovery(
    resolved: Resolved, folder: Path, reporter: Reporter, dense: Source | None = None
) -> Recovery:
    """Open everything that the recovery of a checkpoint needs.

    Args:
        resolved: the settings.
        folder: the checkpoint.
        reporter: receives progress of sampling text.
        dense: the model that the checkpoint was made from, if it is open.

    Raises:
        UsageError: there is no method, there are several processes, or a library is missing.
        SourceError: the checkpoint is missing or cannot be trained, or the dense model is missing
            or has another tokenizer.
        DataError: the text is missing, too short, or lacks a field.
    """
    knobs = resolved.settings.recover
    if knobs.method == "none":
        raise UsageError(
            "Nothing to do: no fine-tuning method is given.", "Give `recover.method` distill."
        )
    check_runs(resolved)
    checkpoint = open_checkpoint(folder)
    check_trains(checkpoint.ranks, resolved)
    check_trainable(checkpoint)
    student = Source(str(folder), folder)
    teacher = dense or open_teacher(resolved, checkpoint)
    if teacher is not None:
        check_teacher(student, teacher)
    check_seqlen(knobs.seqlen, student, "`recover.seqlen`")
    stored = student.weights.infos[f"{next(iter(checkpoint.ranks))}.weight"].dtype
    dtype = training_dtype(resolved, stored)
    check_training(
        resolved,
        (student, teacher),
        dtype,
        tokens_together(resolved),
        checkpoint.factor_parameters,
    )
    run = RunOptions(pick_device(resolved.settings.model.device), dtype, knobs.checkpointing)
    data = training_windows(resolved, checkpoint, student, teacher, run, reporter)
    return Recovery(resolved, student, teacher, run, data)
