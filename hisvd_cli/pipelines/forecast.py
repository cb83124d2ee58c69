"""Settings ─► what a run would take, for ``--dry-run``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.allocation.estimate import (
    Estimate,
    estimate_calibration,
    estimate_decomposition,
    estimate_gradients,
    estimate_measuring,
    estimate_update,
    product_rate,
)
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.calibration.workload import Peak, Workload, update_peak
from hisvd_cli.compression.corrections import BY_GRADIENT
from hisvd_cli.compression.factorize import lay_out
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sublayers import select
from hisvd_cli.pipelines.calibration import named_source
from hisvd_cli.pipelines.calibration_search import find_calibration, wanted_statistics
from hisvd_cli.pipelines.compressing.compression_checks import check_request
from hisvd_cli.pipelines.compressing.quantization import bytes_saved
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import factoring_of, fitted, fitted_update, workload
from hisvd_cli.pipelines.outputs import output_path
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.byte_budgets import scope as byte_scope
from hisvd_cli.pipelines.planning.methods import decomposer_needs, plan_needs, probe_passes
from hisvd_cli.pipelines.planning.plan_checks import check_knobs, check_planning_memory
from hisvd_cli.pipelines.planning.plan_files import open_plan
from hisvd_cli.pipelines.samples import request_calibration
from hisvd_cli.utils.progress import Reporter


def forecast_calibration(resolved: Resolved, source: Source) -> dict[str, Any]:
    """Return the tokens, bytes, memory and seconds of a calibration. Does no work.

    Raises:
        MemoryLimitError: the bound of the settings cannot be kept to.
    """
    needs = wanted_statistics(resolved)
    estimate, work = _calibration(resolved, source, dissect(source), needs)
    return {
        "tokens": work.tokens,
        "bytes": estimate.bytes,
        "peak_memory_bytes": estimate.peak.total,
        "hidden_states": work.place,
        "batch": work.batch,
        "seconds": estimate.seconds,
    }


def forecast_plan(resolved: Resolved) -> dict[str, Any]:
    """Return what planning would measure, and the seconds of that. Does no work.

    Raises:
        HisvdError: whatever would stop the real run before its work.
    """
    source = named_source(resolved)
    check_knobs(resolved, source)
    check_planning_memory(resolved, source)
    anatomy, knobs = dissect(source), resolved.settings.plan
    request = request_calibration(resolved, source)
    count = len(select(anatomy.sublayers, knobs.include, knobs.exclude))
    passes = {name: probe_passes(name, knobs, count) for name in knobs.allocator}
    tokens = min(knobs.probe_samples, request.samples) * request.seqlen
    rate = product_rate(torch.device(request.device), getattr(torch, request.dtype))
    return {
        "allocators": {
            name: estimate_measuring(anatomy.total_parameters, tokens, count, rate)
            for name, count in passes.items()
        },
        "seconds": estimate_measuring(anatomy.total_parameters, tokens, sum(passes.values()), rate),
    }


def _calibration(
    resolved: Resolved, source: Source, anatomy: Anatomy, needs: Collection[Need]
) -> tuple[Estimate, Workload]:
    """Estimate a calibration with all that it needs to hold, as it keeps to a bound on memory."""
    work = fitted(resolved, workload(resolved, source, anatomy), needs)
    plain = estimate_calibration(work)
    if not set(needs) - {"moments"}:
        return plain, work
    more = estimate_gradients(work, "weight-gradients" in needs)
    peak = plain.peak.joined(more.peak)
    return Estimate(plain.bytes + more.bytes, peak, plain.seconds + more.seconds), work


def _between_stages(
    resolved: Resolved, source: Source, anatomy: Anatomy, needs: Collection[Need]
) -> Estimate:
    """Estimate what a stage takes of the text before it: gradients at the truncated model, where
    its correction asks for them, and the statistics of the corrected one."""
    again, work = _calibration(resolved, source, anatomy, needs)
    knobs = resolved.settings.compress
    if knobs.correction not in BY_GRADIENT:
        return again
    few = replace(work, samples=min(knobs.correction_samples or work.samples, work.samples))
    forward, back = estimate_calibration(few), estimate_gradients(few, True)
    peak = again.peak.joined(back.peak)
    return Estimate(again.bytes, peak, again.seconds + forward.seconds + back.seconds)


def forecast_compression(
    resolved: Resolved,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the bytes, memory and seconds of a compression. Does no work.

    Raises:
        HisvdError: whatever would stop the real run before its work.
    """
    source = named_source(resolved)
    check_request(resolved, source, output, plan_file, overwrite)
    plan = open_plan(plan_file, source) if plan_file else None
    anatomy = dissect(source)
    found = find_calibration(resolved, source, reporter)
    needs = _needs(resolved, plan)
    found = found if found and needs <= found.holds else None
    calibrating, work = _calibration(resolved, source, anatomy, needs)
    factoring = factoring_of(resolved, source, anatomy)
    measuring = 0.0 if plan else forecast_plan(resolved)["seconds"]
    count = resolved.settings.compress.stages
    between = _between_stages(resolved, source, anatomy, needs) if count > 1 else None
    again = (count - 1) * between.seconds if between else 0.0
    updating, updated = _update(resolved, source, anatomy, found)
    stages = {
        "calibrate": (0.0 if found else calibrating.seconds) + again,
        "plan": measuring * count,
        "decompose": estimate_decomposition(anatomy.sublayers) * count + updating,
    }
    peak = factoring.joined(updated)
    peak = peak.joined(between.peak) if between else peak
    return {
        "output": str(output_path(resolved, output, plan_file)),
        "ratio": plan.ratio if plan else resolved.settings.plan.ratio[0],
        "bytes": _checkpoint_bytes(resolved, source, anatomy, plan),
        "dense_bytes": source.weights.total_bytes,
        "calibration_bytes": 0 if found else calibrating.bytes,
        "peak_memory_bytes": (peak if found else peak.joined(calibrating.peak)).total,
        "hidden_states": None if found else work.place,
        "batch": None if found else work.batch,
        "stages": stages,
        "seconds": sum(stages.values()),
    }


def _needs(resolved: Resolved, plan: Plan | None) -> frozenset[Need]:
    needs = decomposer_needs(resolved.settings.compress) | wanted_statistics(resolved)
    return needs | plan_needs(resolved.settings) if plan is None else needs


def _update(
    resolved: Resolved, source: Source, anatomy: Anatomy, found: Calibration | None
) -> tuple[float, Peak]:
    """Estimate the walk of two models that an update makes: seconds and peak, 0 without one.

    Raises:
        MemoryLimitError: it does not fit into the bound.
    """
    if resolved.settings.compress.update == "none":
        return 0.0, Peak(0)
    work = workload(resolved, source, anatomy)
    if found:  # it is made on the text of the calibration
        data = found.manifest["data"]
        work = replace(work, samples=data["samples"], seqlen=data["seqlen"])
    work = fitted_update(resolved, work)
    return estimate_update(work), update_peak(work)


def _checkpoint_bytes(
    resolved: Resolved, source: Source, anatomy: Anatomy, plan: Plan | None
) -> int:
    if plan is not None and plan.bytes is not None:
        return plan.bytes.model - plan.bytes.full + plan.bytes.kept
    if plan is None and (share := bytes_ratio(resolved)) is not None:
        scope = byte_scope(share, resolved.settings, source, anatomy)
        return scope.model - scope.full + scope.budget(share)
    total = source.weights.total_bytes
    itemsize = total / anatomy.total_parameters
    inside = sum(s.shape[0] * s.shape[1] for s in anatomy.sublayers)
    if plan is not None:
        size = lay_out(source, plan.ranks, plan.storage).total_bytes
        return size - bytes_saved(resolved, inside - int((total - size) / itemsize), itemsize)
    knobs = resolved.settings.plan
    model = anatomy.size(knobs.include, knobs.exclude)
    dropped = model.sublayers - model.budget(knobs.ratio[0], knobs.ratio_of)
    saved = bytes_saved(resolved, inside - dropped, itemsize)
    return int(total - dropped * itemsize) - saved
