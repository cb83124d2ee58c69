"""``hisvd compress``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from hisvd_cli.options import DryRun, Run, keys_of, option, with_settings


@with_settings(
    [*keys_of("plan", "compress", "model", "calibration"), ("eval", "windows")], together=True
)
def compress(
    run: Run,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            text="Folder, or one file ending in .pt (default MODEL-RATIO).",
            metavar="PATH",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        option("--plan", text="Use this plan.json instead of making a plan.", metavar="FILE"),
    ] = None,
    overwrite: Annotated[
        bool, option("--overwrite", text="Replace a checkpoint that stands there.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Compress a model: calibrate, plan and factor, reusing what is already there.

    Example: hisvd compress --model demo --ratio 0.6
    """
    from hisvd_cli.build.compression import compress_model
    from hisvd_cli.build.forecast import forecast_compression
    from hisvd_cli.views import compressed_view, forecast_view

    if dry_run:
        forecast = forecast_compression(run.resolved, output, plan, overwrite, run.console)
        run.console.show(forecast_view(forecast))
        run.console.result({"dry_run": True, **forecast}, f"{forecast['seconds']:.0f} s")
        return
    outcome = compress_model(run.resolved, output, plan, overwrite, run.console)
    run.console.show(compressed_view(outcome))
    run.console.result(outcome.document(), str(outcome.output))
    made = shlex.quote(str(outcome.output))
    baseline = shlex.quote(run.settings.model.name)
    measuring = f"eval {made} --baseline {baseline}"
    run.console.next_command(f"hisvd {f'inspect {made}' if outcome.perplexity else measuring}")
