"""Trains the low-rank factors of a checkpoint by distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.finetuning.distillation import divergence_from, summed_loss
from hisvd_cli.finetuning.teacher import Teacher
from hisvd_cli.finetuning.trained_pairs import TrainedPair, open_pairs
from hisvd_cli.finetuning.trainer import Progress, Schedule, Trainee, Training
from hisvd_cli.finetuning.training_data import TrainingData
from hisvd_cli.modeling.decoding import TwoParts
from hisvd_cli.modeling.divergence import token_divergences, token_losses
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_model, load_source
from hisvd_cli.utils.progress import Reporter

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""U ``[m, r]`` and V ``[r, n]`` by layer name."""


@dataclass(frozen=True)
class RunOptions:
    """How models run.

    Attributes:
        device: device of both models.
        dtype: dtype of matrix products.
        checkpointing: use activation checkpointing.
    """

    device: torch.device
    dtype: torch.dtype
    checkpointing: bool = False


def distill(
    student: Source,
    teacher: Source,
    data: TrainingData,
    schedule: Schedule,
    run: RunOptions,
    temperature: float,
    home: Path,
    reporter: Reporter,
) -> tuple[Factors, Progress]:
    """Train all low-rank factors towards the output distribution of the dense model.

    Args:
        student: the checkpoint.
        teacher: the dense model.
        data: training windows; the last ones are held out.
        schedule: the schedule.
        run: how the models run.
        temperature: temperature of both distributions in training; held-out measures use 1.
        home: work folder, from which an interrupted training resumes.
        reporter: receives progress.

    Returns:
        The factors of the best held-out state, and the progress.

    Raises:
        NumericalError: the held-out loss of the untrained checkpoint is not finite.
    """
    model = load_model(student.folder, run.device, run.dtype)
    pairs = open_pairs(model)
    set_checkpointing(model, run.checkpointing)
    trained = TwoParts(model, run.dtype)
    dense = load_source(teacher, run.device, run.dtype)
    dense.requires_grad_(False)
    width = teacher.config.get_text_config().hidden_size
    targets = Teacher(TwoParts(dense, run.dtype), data.ids, width, home / "teacher")
    count, held_out = data.split()

    def loss(rows: Tensor) -> tuple[Tensor, int]:
        counted = data.counted[rows].to(run.device)
        reference = targets.states(rows)[counted]
        states = trained.states(data.ids[rows])[counted]
        criterion = divergence_from(reference, targets.head, temperature)
        return summed_loss(states, trained.head, criterion), len(states)

    trainee = Trainee(
        parameters_of(pairs),
        count,
        loss,
        lambda: held_out_measures(trained, data, held_out, schedule.together, targets),
    )
    best, progress = Training(trainee, schedule, home, run.device, reporter).run()
    return {name: (best[f"{name}.u"], best[f"{name}.v"]) for name in pairs}, progress


def parameters_of(pairs: Mapping[str, TrainedPair]) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters of pairs by ``LAYER.u`` and ``LAYER.v``."""
    return {
        f"{name}.{leaf}": parameter
        for name, pair in pairs.items()
        for leaf, parameter in (("u", pair.u), ("v", pair.v))
    }


def set_checkpointing(model: Any, enabled: bool) -> None:
    """Enable activation checkpointing of the blocks of a model, if requested."""
    if not enabled:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.get_decoder().layers:
        # transformers checks the flag of the block only, so dropout inside stays disabled.
        layer.training = True


@torch.no_grad()
def held_out_measures(
    student: TwoParts, data: TrainingData, rows: Tensor, together: int, teacher: Teacher | None
) -> dict[str, float]:
    """Return the mean KL divergence from the teacher, if given, and the mean loss of windows.

    Args:
        student: the trained model.
        data: all windows.
        rows: indices ``[B]`` of the windows to measure.
        together: windows per forward pass.
        teacher: the dense model.

    Returns:
        Means over the counted tokens in nats per token: ``kl`` (with a teacher) and ``loss``.
    """
    divergence = nats = count = 0.0
    for part in rows.split(together):
        states = student.states(data.ids[part])
        reference = teacher.states(part) if teacher else None
        for i, row in enumerate(part):
            counted = data.counted[row, :-1].to(states.device)
            logits = student.head(states[i])
            losses = token_losses(logits, data.ids[row].to(logits.device))
            nats += float(losses[counted].double().sum())
            count += float(counted.sum())
            if teacher and reference is not None:
                kl, _ = token_divergences(teacher.head(reference[i]), logits)
                divergence += float(kl[counted].double().sum())
    measures = {"kl": divergence / count} if teacher else {}
    return {**measures, "loss": nats / count}
