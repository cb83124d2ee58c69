"""``hisvd plan``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hisvd_cli.options import DryRun, Run, keys_of, option, with_settings

if TYPE_CHECKING:
    from hisvd_cli.plan import Plan


@with_settings(keys_of("plan", "model", "calibration"), together=True)
def plan(
    run: Run,
    output: Annotated[
        Path | None,
        option("--output", "-o", text="Write the plan to this .json file.", metavar="FILE"),
    ] = None,
    tables: Annotated[
        bool, option("--tables", text="Show all ranks of each plan that is compared, too.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Show which rank every sublayer would get, before any decomposition.

    Uses the model's calibration where there is one, and the weights alone where there is none.

    Examples: hisvd plan --model demo --ratio 0.8 --ratio 0.6

    hisvd plan --model demo --allocator hisvd --allocator uniform
    """
    from hisvd_cli.build.forecast import forecast_plan
    from hisvd_cli.build.plans import check_plan_file, plan_model
    from hisvd_cli.plan_views import comparison_view, plan_forecast_view, plan_view

    if dry_run:
        forecast = forecast_plan(run.resolved)
        run.console.show(plan_forecast_view(forecast))
        run.console.result({"dry_run": True, **forecast}, f"{forecast['seconds']:.0f} s")
        return
    chosen = run.settings.plan
    if output is not None:
        check_plan_file(output, chosen.ratio, chosen.allocator)
    plans = plan_model(run.resolved, run.console)
    compared = len(chosen.allocator) > 1
    for made in plans if tables or not compared else ():
        run.console.show(plan_view(made, run.console.width))
    if compared:
        run.console.show(comparison_view(plans, run.console.width))
    if output is not None and run.first:
        plans[0].save(output)
    documents = [made.document() for made in plans]
    document = documents[0] if len(documents) == 1 else {"plans": documents}
    run.console.result(document, " ".join(f"{made.model_ratio:.4f}" for made in plans))
    run.console.next_command(_next_command(run, plans[0], output))


def _next_command(run: Run, plan: Plan, output: Path | None) -> str:
    """Return the command that compresses by a plan: by its file, or by what it was made from."""
    flags = run.resolved.flags("model", "calibration")
    if output is not None:
        # The file holds what a preset says of planning, and compress takes no such flag beside it.
        factoring = run.resolved.flags("compress", expanded=True)
        return f"hisvd compress {flags} --plan {shlex.quote(str(output))} {factoring}"
    one_each = [("plan", "ratio"), ("plan", "allocator")]
    several = run.settings.plan.allocator[1:]
    knobs = run.resolved.flags("plan", "compress", without=one_each if several else one_each[:1])
    allocator = f"--allocator {shlex.quote(plan.allocator)} " if several else ""
    return f"hisvd compress {flags} --ratio {plan.ratio:g} {allocator}{knobs}"
