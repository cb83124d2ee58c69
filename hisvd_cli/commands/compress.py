"""``hisvd compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hisvd_cli.options import (
    CALIBRATION_KEYS,
    COMPRESS_KEYS,
    EVAL_KEYS,
    PLAN_KEYS,
    Run,
    with_settings,
)

_EVAL_FLAGS = [key for key in EVAL_KEYS if key[1] == "windows"]


@with_settings([*PLAN_KEYS, *COMPRESS_KEYS, *CALIBRATION_KEYS, *_EVAL_FLAGS])
def compress(
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder, or one file ending in .pt (default MODEL-RATIO)."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Use this plan.json instead of making a plan.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that stands there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory and time; do no work.")
    ] = False,
) -> None:
    """Compress a model: calibrate, plan and factor, reusing what is already there.

    Example: hisvd compress --model demo --ratio 0.6
    """
    from hisvd_cli.build.compression import compress_model, estimate_model
    from hisvd_cli.views import compressed_view, estimate_view

    if dry_run:
        estimate = estimate_model(run.resolved, output, plan, run.console)
        run.console.show(estimate_view(estimate))
        run.console.result({"dry_run": True, **estimate}, f"{estimate['seconds']:.0f} s")
        return
    outcome = compress_model(run.resolved, output, plan, overwrite, run.console)
    run.console.show(compressed_view(outcome))
    run.console.result(outcome.document(), str(outcome.output))
    if outcome.perplexity is None:
        run.console.next_command(
            f"hisvd eval {outcome.output} --baseline {run.settings.model.name}"
        )
    else:
        run.console.next_command(f"hisvd inspect {outcome.output}")
