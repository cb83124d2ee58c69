"""Finds the calibration that the settings describe, or runs it."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import torch

from hisvd_cli.calibration.store import (
    MANIFEST,
    Calibration,
    Sample,
    calibration_key,
    open_calibration,
)
from hisvd_cli.calibration.workload import Workload
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration_runs import add_gradients, collect_moments, expire_inputs
from hisvd_cli.pipelines.calibration_search import (
    calibration_home,
    find_calibration,
    wanted_statistics,
)
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import place_states
from hisvd_cli.pipelines.memory.whole_models import check_writing
from hisvd_cli.pipelines.output_names import check_place, output_name
from hisvd_cli.pipelines.samples import (
    SELF,
    CalibrationRequest,
    calibration_sample,
    draw_sample,
    request_calibration,
)
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import OutputError, StaleArtifactError
from hisvd_cli.utils.progress import Reporter

TOKENS_PER_CHANNEL = 20
"""Warn if there are fewer calibration tokens per hidden channel."""


def ensure_calibration(
    resolved: Resolved,
    source: Source,
    reporter: Reporter,
    *,
    needs: Collection[Need] = (),
    reuse_any: bool = True,
) -> tuple[Calibration, float]:
    """Return a calibration with the required statistics, and the seconds that this took. It is
    found, completed, or made.

    Args:
        resolved: the settings.
        source: the model.
        reporter: receives progress.
        needs: statistics required in addition to those of the settings.
        reuse_any: if False, only a calibration with exactly these settings is reused.

    Raises:
        StaleArtifactError: the named folder holds a calibration of another model, or (without
            ``reuse_any``) with other settings.
        OutputError: the named folder holds something else.
    """
    started = time.monotonic()
    wanted = wanted_statistics(resolved) | set(needs)
    found = None
    if reuse_any:
        found = world().agreed(lambda: find_calibration(resolved, source, reporter))
    if found is None:
        found = _calibrate(resolved, source, reporter, wanted)
    if wanted - found.holds:
        made = found
        sample = world().agreed(lambda: calibration_sample(resolved, source, made, reporter))
        found = add_gradients(resolved, source, made, sample, wanted, reporter)
    expire_inputs(found)
    return found, time.monotonic() - started


def _calibrate(
    resolved: Resolved, source: Source, reporter: Reporter, wanted: Collection[Need]
) -> Calibration:
    request = request_calibration(resolved, source)
    named = resolved.settings.calibration.path
    folder = (
        output_name(Path(named), "calibration.path")
        if named
        else calibration_home(source) / request.key[:16]
    )
    found = world().agreed(lambda: _prepare(resolved, source, request, folder, wanted, reporter))
    if isinstance(found, Calibration):
        return found
    sample, work = found
    dtype: torch.dtype = getattr(torch, request.dtype)
    return collect_moments(resolved, source, sample, folder, dtype, wanted, work, reporter)


def _prepare(
    resolved: Resolved,
    source: Source,
    request: CalibrationRequest,
    folder: Path,
    wanted: Collection[Need],
    reporter: Reporter,
) -> Calibration | tuple[Sample, Workload]:
    """Return the existing calibration, or the tokens and workload of a new one."""
    named = resolved.settings.calibration.path
    if not named and (folder / MANIFEST).is_file():
        return open_calibration(folder, source)
    present = _present(folder, source)
    if present is None and named:  # errors about the cache have hints of their own
        check_place(folder, "calibration.path")
    if request.dataset == SELF:
        check_writing(resolved, source, request.seqlen, f"`calibration.dataset={SELF}`")
    work = place_states(resolved, source, wanted, reporter)
    sample = draw_sample(request, source, reporter)
    _warn_if_few_tokens(source, sample, reporter)
    dtype: torch.dtype = getattr(torch, request.dtype)
    if present is not None and present.key != calibration_key(source, sample, dtype):
        raise StaleArtifactError(
            f"{folder} holds a calibration with other data or settings.",
            "Name another folder with `calibration.path`, or remove this one.",
        )
    return present or (sample, work)


def _warn_if_few_tokens(source: Source, sample: Sample, reporter: Reporter) -> None:
    width = source.config.get_text_config().hidden_size
    if sample.tokens.numel() < TOKENS_PER_CHANNEL * width:
        reporter.warn(
            f"{sample.tokens.numel():,} tokens are few for a model of hidden size {width}: below "
            f"{TOKENS_PER_CHANNEL * width:,}, results depend on the choice of text. Raise "
            "`calibration.samples` or `calibration.seqlen`."
        )


def _present(folder: Path, source: Source) -> Calibration | None:
    """Return the calibration in a folder, if any. Raises OutputError: the folder holds something
    else."""
    if (folder / MANIFEST).is_file():
        return open_calibration(folder, source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder} holds something that is not a calibration.",
            "Name another folder with `calibration.path`.",
        )
    return None
