"""What is found out before a plan is made: sublayers, files, options, statistics and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.allocation.methods import ALLOCATORS
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.linalg.statistics import Need, missing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sublayers import select
from hisvd_cli.pipelines.calibration import named_source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import Settings
from hisvd_cli.pipelines.memory.bounds import check_factoring
from hisvd_cli.pipelines.memory.whole_models import check_measuring
from hisvd_cli.pipelines.outputs import check_plan_output
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.byte_budgets import scope as byte_scope
from hisvd_cli.pipelines.planning.methods import measures, method_that_needs, plan_needs
from hisvd_cli.pipelines.planning.planner import budget_of
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.text_output import check_text_place, takes_text


def check_sublayers(resolved: Resolved, patterns: Sequence[str]) -> None:
    """Find out before any work whether patterns match planned sublayers. Raises UsageError."""
    chosen(resolved, dissect(named_source(resolved)), patterns)


def chosen(resolved: Resolved, anatomy: Anatomy, patterns: Sequence[str]) -> set[str]:
    knobs = resolved.settings.plan
    planned = select(anatomy.sublayers, knobs.include, knobs.exclude)
    return {s.name for s in select(planned, patterns, [])}


def check_plan_file(path: Path, ratios: Sequence[float], allocators: Sequence[str]) -> None:
    """Refuse a file that a plan cannot go to, before any work.

    Raises:
        UsageError: several plans for one file, or a name that is no ``.json``.
        OutputError: something else than a plan stands there.
    """
    for given, flag in ((ratios, "ratio"), (allocators, "allocator")):
        if len(given) > 1:
            raise UsageError(
                f"--output takes one plan, but {len(given)} {flag}s were given.",
                f"Give one --{flag}, or use --json.",
            )
    check_text_place(path, "--output")
    if takes_text(path):
        return
    if path.suffix != ".json":
        raise UsageError(f"--output {path} does not end in .json.", "Name it plan.json, say.")
    check_plan_output(path, overwrite=True)


def check_knobs(resolved: Resolved, source: Source) -> None:
    """Find out before any work whether the settings can be planned at all.

    Raises:
        UsageError: several presets, an unknown allocator, or a pattern that matches nothing.
        BudgetError: a ratio that cannot be met.
    """
    knobs = resolved.settings.plan
    if resolved.variants:
        raise UsageError(
            f"Several presets are set: {', '.join(knobs.preset)}; only compress makes several.",
            "Give one --preset, or several --allocator.",
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
    """Find out before any work whether spectra, and what allocators measure, fit into the bound.

    Raises:
        UsageError, MemoryLimitError: as of :mod:`hisvd_cli.pipelines.memory.bounds`.
    """
    check_factoring(resolved, source)
    for name in filter(measures, resolved.settings.plan.allocator):
        check_measuring(resolved, source, name)


def check_statistics(settings: Settings, calibration: Calibration | None) -> None:
    """Refuse to plan by methods whose statistics were not taken; from the weights alone, whitened
    means weight.

    Raises:
        SourceError: names the method and the command.
        UsageError: an unknown allocator.
    """
    holds = calibration.holds if calibration else frozenset[Need]({"moments"})
    for need in plan_needs(settings) - holds:
        raise missing(method_that_needs(settings, need), need)
