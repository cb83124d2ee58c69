"""Collects activation statistics and gradients, by the settings."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from hisvd_cli.calibration.block_inputs import INPUTS
from hisvd_cli.calibration.calibrate import calibrate
from hisvd_cli.calibration.gradients import measure_gradients
from hisvd_cli.calibration.store import GRADIENTS, MANIFEST, Calibration, Sample, open_calibration
from hisvd_cli.calibration.workload import Workload
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import place_states
from hisvd_cli.pipelines.samples import calibrated_dtype
from hisvd_cli.pipelines.sealing import seal_together
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.files.checksums import sealed
from hisvd_cli.utils.files.scratch import expire
from hisvd_cli.utils.progress import Reporter


def collect_moments(
    resolved: Resolved,
    source: Source,
    sample: Sample,
    folder: Path,
    dtype: torch.dtype,
    wanted: Collection[Need],
    work: Workload,
    reporter: Reporter,
) -> Calibration:
    """Collect the second moments of a model's activations into a calibration folder.

    Args:
        resolved: the settings.
        source: the model.
        sample: the tokens.
        folder: the calibration folder to write.
        dtype: dtype of the forward passes.
        wanted: statistics of the finished calibration; block inputs are kept if these include
            gradients.
        work: batch size, device and place of the hidden states.
        reporter: receives progress.
    """
    return calibrate(
        source,
        sample,
        folder,
        device=work.device,
        dtype=dtype,
        batch=work.batch,
        settings=resolved.recorded("model", "calibration"),
        reporter=reporter,
        keep_inputs=set(wanted) != {"moments"},
        place=work.place,
    )


def add_gradients(
    resolved: Resolved,
    source: Source,
    found: Calibration,
    sample: Sample,
    wanted: Collection[Need],
    reporter: Reporter,
) -> Calibration:
    """Add gradients to a calibration, on ``sample``, the same tokens that it was made from."""
    samples, seqlen = sample.tokens.shape
    work = place_states(resolved, source, wanted, reporter, (samples, seqlen))
    return measure_gradients(
        source,
        sample,
        found,
        device=work.device,
        dtype=calibrated_dtype(resolved, found),
        batch=work.batch,
        weights="weight-gradients" in wanted,
        settings=resolved.recorded("model"),
        reporter=reporter,
        place=work.place,
    )


def expire_inputs(found: Calibration) -> None:
    """Remove block inputs that an interrupted gradient run left long ago."""
    if world().first:
        expire(found.folder / INPUTS)


def calibrate_again(
    resolved: Resolved,
    source: Source,
    sample: Sample,
    folder: Path,
    dtype: torch.dtype,
    wanted: Collection[Need],
    reporter: Reporter,
) -> Calibration:
    """Collect statistics of a model with corrected weights, on the tokens of the original model's
    calibration.

    Args:
        resolved: the settings.
        source: the corrected model.
        sample: the tokens.
        folder: the calibration folder; what an interrupted run left there is used.
        dtype: dtype of the forward passes.
        wanted: statistics to collect.
        reporter: receives progress.
    """
    if world().agreed(lambda: _is_reusable(folder)):
        found = open_calibration(folder, source)
    else:
        samples, seqlen = sample.tokens.shape
        work = place_states(resolved, source, wanted, reporter, (samples, seqlen))
        found = collect_moments(resolved, source, sample, folder, dtype, wanted, work, reporter)
        seal_together(folder)
    if set(wanted) - found.holds:
        found = add_gradients(resolved, source, found, sample, wanted, reporter)
        seal_together(folder / GRADIENTS)
    return found


def _is_reusable(folder: Path) -> bool:
    """Return whether an interrupted run left an undamaged calibration; damaged gradients are
    removed."""
    gradients = folder / GRADIENTS
    if gradients.is_dir() and not sealed(gradients):
        shutil.rmtree(gradients)
    return (folder / MANIFEST).is_file() and sealed(folder)
