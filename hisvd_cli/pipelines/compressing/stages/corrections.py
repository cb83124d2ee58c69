"""Corrects the truncated weights of a stage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from hisvd_cli.allocation.anatomy import dissect
from hisvd_cli.calibration.store import Sample
from hisvd_cli.compression.corrections import BY_GRADIENT, correction
from hisvd_cli.compression.stages import (
    Running,
    Truncated,
    corrected_layers,
    truncated_folder,
    write_by_gradients,
    write_weights,
)
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.compressing.stages.stage import Stage
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import fitted, place_states, workload
from hisvd_cli.pipelines.samples import calibrated_dtype
from hisvd_cli.pipelines.sealing import seal_together, sealed_together
from hisvd_cli.utils.progress import Reporter

_GRADIENTS: frozenset[Need] = frozenset({"moments", "gradients", "weight-gradients"})


def check_stages(resolved: Resolved, source: Source) -> None:
    """Check before any work that the requested stages can be run.

    Raises:
        MemoryLimitError: the gradients of corrections do not fit into the memory limit.
    """
    knobs = resolved.settings.compress
    if knobs.stages > 1 and knobs.correction in BY_GRADIENT:
        fitted(resolved, workload(resolved, source, dissect(source)), _GRADIENTS)


def correct(
    resolved: Resolved,
    first: Stage,
    stage: Stage,
    made: Path,
    folder: Path,
    number: int,
    sample: Sample,
    reporter: Reporter,
) -> None:
    """Write the corrected weights of a stage to ``folder``, and seal it.

    Args:
        resolved: the settings.
        first: the first stage, with the original model.
        stage: the truncated stage.
        made: its checkpoint.
        folder: the folder for the weights.
        number: number of the stage, from 1.
        sample: the tokens of the calibration.
        reporter: receives progress.
    """
    knobs = resolved.settings.compress
    method = partial(
        correction, knobs.correction, alpha=knobs.correction_alpha, step=knobs.correction_step
    )
    teacher = first.source
    layers = corrected_layers(stage.plan)
    checkpoint = open_checkpoint(made)
    truncated = Truncated(teacher, checkpoint, dissect(teacher).names, layers)
    if knobs.correction not in BY_GRADIENT:
        write_weights(truncated, folder, method, reporter)
    else:
        plain = truncated_folder(folder)
        if not sealed_together(plain):
            write_weights(truncated, plain, None, reporter)
            seal_together(plain)
        running = _running(resolved, first, number, sample, reporter)
        write_by_gradients(truncated, folder, method, running, reporter)
    seal_together(folder)


def _running(
    resolved: Resolved, first: Stage, number: int, sample: Sample, reporter: Reporter
) -> Running:
    """Return the windows for gradients, drawn anew for every stage, and how to run them."""
    knobs, tokens = resolved.settings.compress, sample.tokens
    if 0 < knobs.correction_samples < len(tokens):
        generator = torch.Generator().manual_seed(sample.seed + number)
        drawn = torch.randperm(len(tokens), generator=generator)[: knobs.correction_samples]
        tokens = tokens[drawn.sort().values]
    work = place_states(
        resolved,
        first.source,
        _GRADIENTS,
        reporter,
        (len(tokens), tokens.shape[1]),
    )
    return Running(
        tokens=tokens,
        batches=min(knobs.correction_batches, len(tokens)),
        device=work.device,
        dtype=calibrated_dtype(resolved, first.calibration),
        batch=work.batch,
        place=work.place,
    )
