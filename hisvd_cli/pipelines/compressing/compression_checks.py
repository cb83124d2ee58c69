"""Checks before a compression."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.compressing.quantization import check_quantization, quantizes
from hisvd_cli.pipelines.compressing.stages.corrections import check_stages
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.before_and_after import evaluates
from hisvd_cli.pipelines.memory.bounds import check_factoring, check_rounding, check_update
from hisvd_cli.pipelines.memory.whole_models import check_evaluation
from hisvd_cli.pipelines.outputs import check_place_of, output_path, refuse_flags
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.methods import decomposer_needs
from hisvd_cli.pipelines.planning.plan_checks import check_plan_settings, check_planning_memory
from hisvd_cli.pipelines.planning.plan_files import open_plan
from hisvd_cli.pipelines.recovering.recovery_checks import (
    check_recovery,
    check_trains,
    wants_recovery,
)
from hisvd_cli.utils.errors import UsageError


def check_request(
    resolved: Resolved,
    source: Source,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
) -> None:
    """Check before any work that a compression can succeed.

    Raises:
        UsageError: several allocators, an unknown method, or settings that the given plan decides.
        BudgetError: the ratio cannot be met.
        MemoryLimitError: the work does not fit into the memory limit.
        OutputError: the output exists or cannot be written.
    """
    decomposer_needs(resolved.settings.compress)
    check_stages(resolved, source)
    if plan_file is None:
        check_quantization(resolved, planned=bytes_ratio(resolved) is not None)
        if len(resolved.settings.plan.allocator) > 1:
            raise UsageError("compress takes one `plan.allocator`.", "Run it once per allocator.")
        check_plan_settings(resolved, source)
        check_planning_memory(resolved, source)
    else:
        _check_given_plan(resolved, source, plan_file)
    check_update(resolved, source)
    if resolved.settings.quantize.method == "gptq" and quantizes(resolved):
        check_rounding(resolved, source)
    if evaluates(resolved, source):
        check_evaluation(resolved, source)
    if wants_recovery(resolved):
        if plan_file is not None:
            check_trains(open_plan(plan_file, source).ranks, resolved)
        elif bytes_ratio(resolved) is None and max(resolved.settings.plan.ratio) == 1:
            check_trains({}, resolved)
        check_recovery(resolved, source)
    path = output_path(resolved, output, plan_file)
    check_place_of(resolved, source, path, plan_file, overwrite)


def _check_given_plan(resolved: Resolved, source: Source, plan_file: Path) -> None:
    given = ("the given plan", "make another plan")
    refuse_flags(resolved, "plan", *given)
    if resolved.variants:
        raise UsageError(
            "Several presets are set, but `plan` names one plan.",
            "Leave out `plan`, or set one preset.",
        )
    by_bytes = open_plan(plan_file, source).bytes is not None
    if by_bytes:
        refuse_flags(resolved, "quantize", *given, but=("bits", "damping"))
    check_quantization(resolved, planned=by_bytes)
    check_factoring(resolved, source)
