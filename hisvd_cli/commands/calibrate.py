"""``hisvd calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer

from hisvd_cli.options import CALIBRATION_KEYS, Run, with_settings


@with_settings(CALIBRATION_KEYS)
def calibrate(
    run: Run,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory and time; do no work.")
    ] = False,
) -> None:
    """Run text through a model, block by block, and keep what its sublayers see.

    Example: hisvd calibrate --model HuggingFaceTB/SmolLM2-135M --samples 64 --seqlen 1024
    """
    from hisvd_cli.build.calibration import (
        ensure_calibration,
        named_source,
        request_calibration,
    )
    from hisvd_cli.estimate import estimate_calibration
    from hisvd_cli.views import calibration_view, estimate_view

    source = named_source(run.resolved)
    if dry_run:
        estimate = estimate_calibration(
            source, request_calibration(run.resolved, source), run.settings.calibration.batch
        )
        run.console.show(estimate_view(estimate))
        run.console.result({"dry_run": True, **estimate}, f"{estimate['seconds']:.0f} s")
        return
    made, seconds = ensure_calibration(run.resolved, source, run.console, reuse_any=False)
    document = {"output": str(made.folder), "seconds": seconds, **made.manifest}
    run.console.show(calibration_view(made, seconds))
    run.console.result(document, str(made.folder))
    extra = f" --calibration {made.folder}" if run.settings.calibration.path else ""
    run.console.next_command(f"hisvd plan --model {source.name} --ratio 0.8{extra}")
