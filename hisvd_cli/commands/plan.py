"""``hisvd plan``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from hisvd_cli.options import Run, keys_of, option, with_settings


@with_settings(keys_of("plan", "model", "calibration"))
def plan(
    run: Run,
    output: Annotated[
        Path | None,
        option("--output", "-o", text="Write the plan to this .json file.", metavar="FILE"),
    ] = None,
) -> None:
    """Show which rank every sublayer would get, before any decomposition.

    Uses the model's calibration where there is one, and the weights alone where there is none.

    Example: hisvd plan --model demo --ratio 0.8 --ratio 0.6
    """
    from hisvd_cli.build.plans import check_plan_file, plan_model
    from hisvd_cli.views import plan_view

    if output is not None:
        check_plan_file(output, run.settings.plan.ratio)
    plans = plan_model(run.resolved, run.console)
    for made in plans:
        run.console.show(plan_view(made, run.console.width))
    if output is not None:
        plans[0].save(output)
    documents = [made.document() for made in plans]
    document = documents[0] if len(documents) == 1 else {"plans": documents}
    run.console.result(document, " ".join(f"{made.model_ratio:.4f}" for made in plans))
    if output is not None:
        chosen = f"--plan {shlex.quote(str(output))}"
    else:
        knobs = run.resolved.flags("plan", without=("plan", "ratio"))
        chosen = f"--ratio {plans[0].ratio:g} {knobs}"
    flags = run.resolved.flags("model", "calibration")
    run.console.next_command(f"hisvd compress {flags} {chosen}")
