"""Estimates of planning."""

from __future__ import annotations

from typing import Any

import torch

from hisvd_cli.allocation.anatomy import dissect
from hisvd_cli.allocation.estimate import estimate_measuring, product_rate
from hisvd_cli.modeling.structure.sublayers import select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.planning.methods import probe_passes
from hisvd_cli.pipelines.planning.plan_checks import check_plan_settings, check_planning_memory
from hisvd_cli.pipelines.samples import request_calibration


def forecast_plan(resolved: Resolved) -> dict[str, Any]:
    """Return the seconds that each allocator runs the model, and their sum. Does no work.

    Raises:
        HisvdError: any error that would stop the real run before its work.
    """
    source = named_source(resolved)
    check_plan_settings(resolved, source)
    check_planning_memory(resolved, source)
    anatomy, knobs = dissect(source), resolved.settings.plan
    request = request_calibration(resolved, source)
    count = len(select(anatomy.sublayers, knobs.include, knobs.exclude))
    passes = {name: probe_passes(name, knobs, count) for name in knobs.allocator}
    tokens = min(knobs.probe_samples, request.samples) * request.seqlen
    rate = product_rate(torch.device(request.device), getattr(torch, request.dtype))
    used = anatomy.active_parameters or anatomy.total_parameters
    return {
        "allocators": {
            name: estimate_measuring(used, tokens, count, rate) for name, count in passes.items()
        },
        "seconds": estimate_measuring(used, tokens, sum(passes.values()), rate),
    }
