"""Statistics and options of the methods that the settings name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.allocation.methods.asvd import AsvdOptions
from hisvd_cli.allocation.methods.learned import LearnedOptions
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.statistics import COMMANDS, Need
from hisvd_cli.pipelines.config.settings import CompressSettings, PlanSettings, Settings


def measures(allocator: str) -> bool:
    """Return whether an allocator runs the model to measure the effect of truncation."""
    return "probe" in inspect.signature(ALLOCATORS.get(allocator)).parameters


def probe_passes(allocator: str, knobs: PlanSettings, sublayers: int) -> float:
    """Estimate the number of forward passes over the probe text that an allocator takes.

    Truncating one sublayer needs only the blocks from it on: half a pass on average. A step of
    ``learned`` is a forward pass of one window, with both factors of every sublayer, and a backward
    pass.
    """
    if not measures(allocator):
        return 0.0
    options = ALLOCATORS.options(allocator, knobs.model_dump())
    if isinstance(options, LearnedOptions):
        return 5 * options.learning_steps / knobs.probe_samples
    each = len(options.sensitivity_ratios) if isinstance(options, AsvdOptions) else 1
    return sublayers * each / 2


def plan_needs(settings: Settings) -> frozenset[Need]:
    """Return the statistics that planning needs. Raises UsageError: an unknown method."""
    knobs = settings.plan
    values = knobs.model_dump()
    needs: set[str] = {"moments"}
    if knobs.metric in ("fisher", "held-out"):
        needs |= {"gradients"}
    for name in knobs.allocator:
        needs |= ALLOCATORS.needs(name, values) & COMMANDS.keys()
        if measures(name):
            needs |= decomposer_needs(settings.compress)
    return cast(frozenset[Need], frozenset(needs))


def method_that_needs(settings: Settings, need: Need) -> str:
    """Return the name of a planning method that needs a statistic, for an error message."""
    for name in settings.plan.allocator:
        if need in ALLOCATORS.needs(name, settings.plan.model_dump()):
            return name
    metric = settings.plan.metric
    return metric if metric in ("fisher", "held-out") else settings.compress.decomposer


def decomposer_needs(knobs: CompressSettings) -> frozenset[Need]:
    """Return the statistics that decomposing needs. Raises UsageError: an unknown method."""
    return cast(frozenset[Need], DECOMPOSERS.needs(knobs.decomposer, knobs.model_dump()))


def compression_needs(settings: Settings, plans: bool) -> frozenset[Need]:
    """Return the statistics that a compression needs, with those of planning if it plans. Raises
    UsageError: an unknown method."""
    needs = decomposer_needs(settings.compress)
    return needs | plan_needs(settings) if plans else needs


def decomposer_knobs(
    settings: Settings, planned: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of all options that a decomposer may take.

    Args:
        settings: the settings.
        planned: settings that a given plan was made with. They override those of ``[plan]``, so
            that decomposing uses the metric of the plan.
    """
    plan: PlanSettings = settings.plan
    recorded = {
        key: value for key, value in (planned or {}).items() if key in type(plan).model_fields
    }
    seed = settings.calibration.seed
    return {**plan.model_dump(), **recorded, **settings.compress.model_dump(), "seed": seed}
