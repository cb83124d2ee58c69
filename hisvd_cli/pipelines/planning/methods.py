"""Settings ─► what the methods that they name need, and are given."""

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
    """Tell whether an allocator runs the model to measure what truncation does."""
    return "probe" in inspect.signature(ALLOCATORS.get(allocator)).parameters


def probe_passes(allocator: str, knobs: PlanSettings, sublayers: int) -> float:
    """Return how many forward passes over the probe text an allocator takes, about.

    A sublayer truncated alone leaves the blocks before it as they are: half a pass on average. A
    step of ``learned`` runs one window forward, with both factors of every sublayer, and backward.
    """
    if not measures(allocator):
        return 0.0
    options = ALLOCATORS.options(allocator, knobs.model_dump())
    if isinstance(options, LearnedOptions):
        return 5 * options.learning_steps / knobs.probe_samples
    each = len(options.sensitivity_ratios) if isinstance(options, AsvdOptions) else 1
    return sublayers * each / 2


def plan_needs(settings: Settings) -> frozenset[Need]:
    """Return what planning needs of a calibration. Raises UsageError for an unknown method."""
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
    """Return the name of a planning method that needs a statistic, for an error to name."""
    for name in settings.plan.allocator:
        if need in ALLOCATORS.needs(name, settings.plan.model_dump()):
            return name
    metric = settings.plan.metric
    return metric if metric in ("fisher", "held-out") else settings.compress.decomposer


def decomposer_needs(knobs: CompressSettings) -> frozenset[Need]:
    """Return what decomposing needs of a calibration. Raises UsageError for an unknown method."""
    return cast(frozenset[Need], DECOMPOSERS.needs(knobs.decomposer, knobs.model_dump()))


def decomposer_knobs(
    settings: Settings, planned: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of all knobs that a decomposer may name.

    Args:
        settings: the settings.
        planned: settings that a given plan was made with; they win over those of its section, so
            that a plan is carried out in the metric that it counted with.
    """
    plan: PlanSettings = settings.plan
    recorded = {
        key: value for key, value in (planned or {}).items() if key in type(plan).model_fields
    }
    seed = settings.calibration.seed
    return {**plan.model_dump(), **recorded, **settings.compress.model_dump(), "seed": seed}
