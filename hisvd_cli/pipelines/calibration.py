"""Settings ─► a source and its calibration: found where it was made before, else made now."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path

import torch

from hisvd_cli.calibration.block_inputs import INPUTS
from hisvd_cli.calibration.calibrate import calibrate
from hisvd_cli.calibration.gradients import measure_gradients
from hisvd_cli.calibration.store import (
    GRADIENTS,
    MANIFEST,
    Calibration,
    Sample,
    calibration_key,
    open_calibration,
)
from hisvd_cli.calibration.workload import Workload
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
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
    calibrated_dtype,
    calibration_sample,
    draw_sample,
    request_calibration,
)
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import OutputError, StaleArtifactError, UsageError
from hisvd_cli.utils.files.checksums import seal, sealed
from hisvd_cli.utils.files.scratch import expire
from hisvd_cli.utils.progress import Reporter

TOKENS_PER_CHANNEL = 20
"""Fewer calibration tokens than this for each hidden channel get a warning."""


def named_source(resolved: Resolved) -> Source:
    """Open the model of the settings. Raises UsageError where none is named."""
    model = resolved.settings.model
    if not model.name:
        raise UsageError(
            "No model is named.",
            "Give `model.name` with a Hub id, a folder, a .gguf file, or 'demo'.",
        )

    def fetch() -> Source:
        found = open_source(model.name, model.revision, model.trust_remote_code)
        if world().size > 1:
            _ = found.fingerprint  # reads all weights of a local model; others find it cached
        return found

    return world().after_first(fetch)


def ensure_calibration(
    resolved: Resolved,
    source: Source,
    reporter: Reporter,
    *,
    needs: Collection[Need] = (),
    reuse_any: bool = True,
) -> tuple[Calibration, float]:
    """Return a calibration that holds what is needed, made or completed now where there is none,
    and the seconds that it took.

    Args:
        resolved: the settings.
        source: the model.
        reporter: told of progress.
        needs: what it must hold beside what the settings ask for.
        reuse_any: False only takes a calibration with exactly these settings.

    Raises:
        StaleArtifactError: the folder named holds a calibration of another model, or (without
            ``reuse_any``) of other settings.
        OutputError: the folder named holds something else.
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
        found = _add_gradients(resolved, source, made, sample, wanted, reporter)
    if world().first:
        expire(found.folder / INPUTS)  # of a walk for gradients that nobody has finished
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
    found = world().agreed(lambda: _look(resolved, source, request, folder, wanted, reporter))
    if isinstance(found, Calibration):
        return found
    sample, work = found
    return calibrate(
        source,
        sample,
        folder,
        device=torch.device(request.device),
        dtype=getattr(torch, request.dtype),
        batch=work.batch,
        settings=resolved.recorded("model", "calibration"),
        reporter=reporter,
        keep_inputs=set(wanted) != {"moments"},
        place=work.place,
    )


def _look(
    resolved: Resolved,
    source: Source,
    request: CalibrationRequest,
    folder: Path,
    wanted: Collection[Need],
    reporter: Reporter,
) -> Calibration | tuple[Sample, Workload]:
    """Return the calibration that is there already, or what one is to be made from."""
    named = resolved.settings.calibration.path
    if not named and (folder / MANIFEST).is_file():
        return open_calibration(folder, source)
    present = _present(folder, source)
    if present is None and named:  # the cache says by itself what to do
        check_place(folder, "calibration.path")
    if request.dataset == SELF:
        check_writing(resolved, source, request.seqlen, f"`calibration.dataset` {SELF}")
    work = place_states(resolved, source, wanted, reporter)
    sample = draw_sample(request, source, reporter)
    _warn_of_few(source, sample, reporter)
    dtype: torch.dtype = getattr(torch, request.dtype)
    if present is not None and present.key != calibration_key(source, sample, dtype):
        raise StaleArtifactError(
            f"{folder} holds a calibration with other data or settings.",
            "Name another folder with `calibration.path`, or remove this one.",
        )
    return present or (sample, work)


def _warn_of_few(source: Source, sample: Sample, reporter: Reporter) -> None:
    """Tell where there are too few tokens for the width of what is measured."""
    width = source.config.get_text_config().hidden_size
    if sample.tokens.numel() < TOKENS_PER_CHANNEL * width:
        reporter.warn(
            f"{sample.tokens.numel():,} tokens are few for a model of hidden size {width}: below "
            f"{TOKENS_PER_CHANNEL * width:,}, results depend on the choice of text. Raise "
            "`calibration.samples` or `calibration.seqlen`."
        )


def calibrate_again(
    resolved: Resolved,
    source: Source,
    sample: Sample,
    folder: Path,
    dtype: torch.dtype,
    wanted: Collection[Need],
    reporter: Reporter,
) -> Calibration:
    """Take statistics of a model with corrected weights, on the tokens of the original's.

    Args:
        resolved: the settings.
        source: the corrected model.
        sample: the tokens.
        folder: where the calibration goes, or is already.
        dtype: in which blocks run.
        wanted: what it must hold.
        reporter: told of progress.
    """
    if world().agreed(lambda: _kept(folder)):
        found = open_calibration(folder, source)
    else:
        samples, seqlen = sample.tokens.shape
        work = place_states(resolved, source, wanted, reporter, (samples, seqlen))
        found = calibrate(
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
        _seal(folder)
    if set(wanted) - found.holds:
        found = _add_gradients(resolved, source, found, sample, wanted, reporter)
        _seal(folder / GRADIENTS)
    return found


def _kept(folder: Path) -> bool:
    """Tell whether an interrupted run left a calibration that was not damaged since; gradients that
    were are removed."""
    gradients = folder / GRADIENTS
    if gradients.is_dir() and not sealed(gradients):
        shutil.rmtree(gradients)
    return (folder / MANIFEST).is_file() and sealed(folder)


def _seal(folder: Path) -> None:
    if world().first:
        seal(folder)
    world().wait()


def _add_gradients(
    resolved: Resolved,
    source: Source,
    found: Calibration,
    sample: Sample,
    wanted: Collection[Need],
    reporter: Reporter,
) -> Calibration:
    """Take the gradients on ``sample``, the very tokens that a calibration was made from."""
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


def _present(folder: Path, source: Source) -> Calibration | None:
    """Return the calibration that stands in a folder; refuse anything else there."""
    if (folder / MANIFEST).is_file():
        return open_calibration(folder, source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder} holds something that is not a calibration.",
            "Name another folder with `calibration.path`.",
        )
    return None
