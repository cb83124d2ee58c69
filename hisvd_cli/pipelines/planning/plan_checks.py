"""Checks before planning: settings, statistics and memory."""

from __future__ import annotations

from hisvd_cli.allocation.anatomy import dissect
from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.linalg.statistics import Need, missing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import check_factoring
from hisvd_cli.pipelines.memory.whole_models import check_measuring
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.byte_budgets import scope as byte_scope
from hisvd_cli.pipelines.planning.methods import measures, method_that_needs, plan_needs
from hisvd_cli.pipelines.planning.planner import budget_of
from hisvd_cli.utils.errors import UsageError

_STATISTICS = [("calibration", "gradients"), ("calibration", "weight_gradients")]


def check_plan_settings(resolved: Resolved, source: Source) -> None:
    """Check before any work that the settings can be planned.

    Raises:
        UsageError: several presets, an unknown allocator, or a pattern that matches nothing.
        BudgetError: the ratio cannot be met.
    """
    knobs = resolved.settings.plan
    if resolved.variants:
        raise UsageError(
            f"Several presets are set: {', '.join(knobs.preset)}. Only compress takes several.",
            "Give one `plan.preset`, or several `plan.allocator`.",
        )
    for name in knobs.allocator:
        ALLOCATORS.get(name)
    anatomy = dissect(source)
    if (ratio := bytes_ratio(resolved)) is not None:
        byte_scope(ratio, resolved.settings, source, anatomy).check()
        return
    chosen = select(anatomy.sublayers, knobs.include, knobs.exclude)
    for ratio in knobs.ratio:
        budget_of(ratio, knobs, chosen, anatomy.size(knobs.include, knobs.exclude))


def check_planning_memory(resolved: Resolved, source: Source) -> None:
    """Check before any work that spectra, and allocators that run the model, fit into the memory
    limit.

    Raises:
        UsageError, MemoryLimitError: see :mod:`hisvd_cli.pipelines.memory.bounds`.
    """
    check_factoring(resolved, source)
    for name in filter(measures, resolved.settings.plan.allocator):
        check_measuring(resolved, source, name)


def check_statistics(resolved: Resolved, calibration: Calibration | None) -> None:
    """Check that the statistics of all chosen methods were collected. Without a calibration, the
    metric whitened uses the weights alone.

    Raises:
        SourceError: statistics are missing; names the method and the command, with the
            model and the text.
        UsageError: an unknown allocator.
    """
    holds = calibration.holds if calibration else frozenset[Need]({"moments"})
    for need in plan_needs(resolved.settings) - holds:
        error = missing(method_that_needs(resolved.settings, need), need)
        given = resolved.flags("model", "calibration", without=_STATISTICS)
        error.hint = error.hint.replace("hisvd calibrate", f"hisvd calibrate {given}".rstrip(), 1)
        raise error
