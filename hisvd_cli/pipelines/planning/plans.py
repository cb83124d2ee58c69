"""Plans the model of the settings."""

from __future__ import annotations

from collections.abc import Sequence

from hisvd_cli.allocation.anatomy import dissect
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.tensors import tell_notes
from hisvd_cli.pipelines.calibration_search import find_calibration, require_calibration
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.byte_budgets import scope as byte_scope
from hisvd_cli.pipelines.planning.plan_checks import (
    check_plan_settings,
    check_planning_memory,
    check_statistics,
)
from hisvd_cli.pipelines.planning.planner import Planner
from hisvd_cli.pipelines.planning.probes import open_probe
from hisvd_cli.pipelines.planning.spectra import find_roundings, find_spectra
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.progress import Reporter


def plan_model(resolved: Resolved, reporter: Reporter) -> list[Plan]:
    """Plan the model of the settings at each ratio, from its calibration if there is one, or else
    from its weights alone.

    Raises:
        UsageError, BudgetError: see :func:`check_plan_settings`.
        SourceError: the named calibration does not exist.
    """
    source = named_source(resolved)
    tell_notes(source, reporter)
    check_plan_settings(resolved, source)
    check_planning_memory(resolved, source)
    named = resolved.settings.calibration.path is not None
    find = require_calibration if named else find_calibration
    calibration = world().agreed(lambda: find(resolved, source, reporter))
    if calibration is None:
        reporter.warn(
            f"{source.name} has no calibration with these settings: planning from its weights "
            "alone."
        )
    return make_plans(resolved, source, calibration, reporter)


def make_plans(
    resolved: Resolved,
    source: Source,
    calibration: Calibration | None,
    reporter: Reporter,
    ratios: Sequence[float] | None = None,
) -> list[Plan]:
    """Plan a model by each allocator of the settings, at each ratio of the settings or of
    ``ratios``.

    Raises:
        UsageError: an unknown allocator, or a pattern that matches nothing.
        SourceError: a method needs statistics that were not collected; names the command.
        BudgetError: the ratio cannot be met.
    """
    check_statistics(resolved, calibration)
    if calibration and "gradients" in calibration.holds and resolved.uses_defaults("plan"):
        reporter.suggest("This calibration contains gradients; `plan.preset` best uses them.")
    anatomy = dissect(source)
    knobs = resolved.settings.plan
    share = bytes_ratio(resolved)
    planner = Planner(
        knobs=knobs,
        spectra=find_spectra(resolved, source, anatomy, calibration, reporter),
        anatomy=anatomy,
        source=source,
        calibration=calibration,
        probe=open_probe(resolved, source, anatomy, calibration, reporter)
        if world().first and share is None
        else None,
    )
    if share is not None:
        scope = byte_scope(share, resolved.settings, source, anatomy)
        roundings = find_roundings(resolved, source, anatomy, calibration, reporter)
        return world().agreed(lambda: [planner.plan_bytes(scope, roundings)])
    # One process only: some allocators run the model.
    return world().agreed(
        lambda: [
            planner.plan(allocator, ratio)
            for allocator in knobs.allocator
            for ratio in ratios or knobs.ratio
        ]
    )
