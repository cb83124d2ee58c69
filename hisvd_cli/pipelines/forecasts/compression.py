"""Estimates of a whole compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hisvd_cli.allocation.anatomy import dissect
from hisvd_cli.allocation.estimate import estimate_decomposition
from hisvd_cli.pipelines.calibration_search import find_calibration, wanted_statistics
from hisvd_cli.pipelines.compressing.compression_checks import check_request
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.forecasts.calibration import (
    calibration_estimate,
    stage_estimate,
    update_estimate,
)
from hisvd_cli.pipelines.forecasts.checkpoint_size import checkpoint_bytes
from hisvd_cli.pipelines.forecasts.planning import forecast_plan
from hisvd_cli.pipelines.memory.bounds import factoring_of
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.outputs import output_path
from hisvd_cli.pipelines.planning.methods import compression_needs
from hisvd_cli.pipelines.planning.plan_files import open_plan
from hisvd_cli.utils.progress import Reporter


def forecast_compression(
    resolved: Resolved,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the bytes, memory and seconds of a compression. Does no work.

    Raises:
        HisvdError: any error that would stop the real run before its work.
    """
    source = named_source(resolved)
    check_request(resolved, source, output, plan_file, overwrite)
    plan = open_plan(plan_file, source) if plan_file else None
    anatomy = dissect(source)
    found = find_calibration(resolved, source, reporter)
    needs = compression_needs(resolved.settings, plan is None) | wanted_statistics(resolved)
    found = found if found and needs <= found.holds else None
    calibrating, work = calibration_estimate(resolved, source, anatomy, needs)
    measuring = 0.0 if plan else forecast_plan(resolved)["seconds"]
    count = resolved.settings.compress.stages
    between = stage_estimate(resolved, source, anatomy, needs) if count > 1 else None
    again = (count - 1) * between.seconds if between else 0.0
    updating, updated = update_estimate(resolved, source, anatomy, found)
    stages = {
        "calibrate": (0.0 if found else calibrating.seconds) + again,
        "plan": measuring * count,
        "decompose": estimate_decomposition(anatomy.sublayers) * count + updating,
    }
    peak = factoring_of(resolved, source, anatomy).joined(updated)
    peak = peak.joined(between.peak) if between else peak
    return {
        "output": str(output_path(resolved, output, plan_file)),
        "ratio": plan.ratio if plan else resolved.settings.plan.ratio[0],
        "bytes": checkpoint_bytes(resolved, source, anatomy, plan),
        "dense_bytes": source.weights.total_bytes,
        "calibration_bytes": 0 if found else calibrating.bytes,
        "peak_memory_bytes": (peak if found else peak.joined(calibrating.peak)).total,
        "hidden_states": None if found else work.place,
        "batch": None if found else work.batch,
        "stages": stages,
        "seconds": sum(stages.values()),
    }
