"""``hisvd plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hisvd_cli.options import CALIBRATION_KEYS, PLAN_KEYS, Run, with_settings


@with_settings([*PLAN_KEYS, *CALIBRATION_KEYS])
def plan(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this .json file.")
    ] = None,
) -> None:
    """Show which rank every sublayer would get, before any decomposition.

    Uses the model's calibration where there is one, and the weights alone where there is none.

    Example: hisvd plan --model demo --ratio 0.8 --ratio 0.6
    """
    from hisvd_cli.build.calibration import (
        find_calibration,
        named_source,
        require_calibration,
    )
    from hisvd_cli.build.plans import make_plans
    from hisvd_cli.errors import UsageError
    from hisvd_cli.views import plan_view

    if output is not None and len(run.settings.plan.ratio) > 1:
        raise UsageError(
            "--output takes one plan, but several ratios were given.",
            "Give one --ratio, or use --json.",
        )
    source = named_source(run.resolved)
    named = run.settings.calibration.path is not None
    find = require_calibration if named else find_calibration
    calibration = find(run.resolved, source, run.console)
    if calibration is None:
        run.console.warn(
            f"{source.name} is not calibrated with these settings: planned from its weights alone."
        )
    plans = make_plans(run.resolved, source, calibration, run.console)
    for made in plans:
        run.console.show(plan_view(made, run.console.width))
    if output is not None:
        plans[0].save(output)
    documents = [made.document() for made in plans]
    document = documents[0] if len(documents) == 1 else {"plans": documents}
    run.console.result(document, " ".join(f"{made.model_ratio:.4f}" for made in plans))
    arguments = f"--plan {output}" if output else f"--ratio {plans[0].ratio:g}"
    run.console.next_command(f"hisvd compress --model {source.name} {arguments}")
