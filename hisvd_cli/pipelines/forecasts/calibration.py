"""Estimates of calibrations, and of other passes over calibration text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.allocation.estimate import (
    Estimate,
    estimate_calibration,
    estimate_gradients,
    estimate_update,
)
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.calibration.workload import Peak, Workload, update_peak
from hisvd_cli.compression.corrections import BY_GRADIENT
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration_search import wanted_statistics
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import fitted, fitted_update, workload


def forecast_calibration(resolved: Resolved, source: Source) -> dict[str, Any]:
    """Return the tokens, bytes, memory and seconds of a calibration. Does no work.

    Raises:
        MemoryLimitError: it does not fit into the memory limit.
    """
    needs = wanted_statistics(resolved)
    estimate, work = calibration_estimate(resolved, source, dissect(source), needs)
    return {
        "tokens": work.tokens,
        "bytes": estimate.bytes,
        "peak_memory_bytes": estimate.peak.total,
        "hidden_states": work.place,
        "batch": work.batch,
        "seconds": estimate.seconds,
    }


def calibration_estimate(
    resolved: Resolved, source: Source, anatomy: Anatomy, needs: Collection[Need]
) -> tuple[Estimate, Workload]:
    """Estimate a calibration with the given statistics, within the memory limit; return its
    workload as well."""
    work = fitted(resolved, workload(resolved, source, anatomy), needs)
    plain = estimate_calibration(work)
    if not set(needs) - {"moments"}:
        return plain, work
    more = estimate_gradients(work, "weight-gradients" in needs)
    peak = plain.peak.joined(more.peak)
    return Estimate(plain.bytes + more.bytes, peak, plain.seconds + more.seconds), work


def stage_estimate(
    resolved: Resolved, source: Source, anatomy: Anatomy, needs: Collection[Need]
) -> Estimate:
    """Estimate the passes between two stages: gradients of the truncated model, if the correction
    uses them, and the statistics of the corrected model."""
    again, work = calibration_estimate(resolved, source, anatomy, needs)
    knobs = resolved.settings.compress
    if knobs.correction not in BY_GRADIENT:
        return again
    few = replace(work, samples=min(knobs.correction_samples or work.samples, work.samples))
    forward, back = estimate_calibration(few), estimate_gradients(few, True)
    peak = again.peak.joined(back.peak)
    return Estimate(again.bytes, peak, again.seconds + forward.seconds + back.seconds)


def update_estimate(
    resolved: Resolved, source: Source, anatomy: Anatomy, found: Calibration | None
) -> tuple[float, Peak]:
    """Estimate the seconds and peak memory of an update, which runs two models; 0 without one.

    Raises:
        MemoryLimitError: it does not fit into the memory limit.
    """
    if resolved.settings.compress.update == "none":
        return 0.0, Peak(0)
    work = workload(resolved, source, anatomy)
    if found:  # an update uses the text of the calibration
        data = found.manifest["data"]
        work = replace(work, samples=data["samples"], seqlen=data["seqlen"])
    work = fitted_update(resolved, work)
    return estimate_update(work), update_peak(work)
