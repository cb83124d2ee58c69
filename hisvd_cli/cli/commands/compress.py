"""``hisvd compress``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from hisvd_cli.cli.console import joint_error
from hisvd_cli.cli.options import DryRun, Run, option, with_settings
from hisvd_cli.pipelines.config.commands import SETTINGS
from hisvd_cli.pipelines.config.mentions import in_flags
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.cache import expanded


@with_settings(SETTINGS["compress"], together=True)
def compress(
    run: Run,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            text="Output folder, or a single .pt file (default MODEL-RATIO). With several presets "
            "or ratios: the parent folder of MODEL-PRESET-RATIO.",
            metavar="PATH",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        option(
            "--plan",
            text="Use this plan.json instead of planning; it names the model.",
            metavar="FILE",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        option(
            "--from",
            text="Only apply --recover to this checkpoint (output: CHECKPOINT-METHOD); --model "
            "gives the dense model if it has moved.",
            metavar="FOLDER",
        ),
    ] = None,
    overwrite: Annotated[
        bool, option("--overwrite", text="Overwrite an existing checkpoint.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Compress a model: calibrate, plan and factorize, reusing existing results.

    Several ratios and presets produce one checkpoint each from a single calibration.

    Examples: hisvd compress --model demo --ratio 0.6

    hisvd compress --model demo --ratio 0.8 --ratio 0.6 --preset hisvd --preset best

    hisvd compress --from demo-0.6 --recover distill --recover-minutes 20
    """
    from hisvd_cli.pipelines.output_names import output_name

    output = output and output_name(output)
    plan = plan and expanded(str(plan))
    checkpoint = checkpoint and expanded(str(checkpoint))
    if checkpoint is not None:
        if plan is not None:
            raise UsageError(
                "--from and --plan cannot be combined: the checkpoint has a plan.",
                "Leave out --plan.",
            )
        _recover(run, checkpoint, output, overwrite, dry_run)
        return
    from hisvd_cli.allocation.plan import load_plan
    from hisvd_cli.cli.views.results import compressed_view, forecast_view
    from hisvd_cli.pipelines.compressing.compression import compress_model
    from hisvd_cli.pipelines.compressing.grid.cells import is_grid
    from hisvd_cli.pipelines.forecasts.compression import forecast_compression
    from hisvd_cli.pipelines.planning.plan_files import with_model_of
    from hisvd_cli.pipelines.unused_options import check_options

    given = load_plan(plan) if plan else None
    run = run if given is None else replace(run, resolved=with_model_of(run.resolved, given))
    check_options(run.resolved, "compress", given)
    if plan is None and is_grid(run.resolved):
        _compress_grid(run, output, overwrite, dry_run)
        return
    if dry_run:
        forecast = forecast_compression(run.resolved, output, plan, overwrite, run.console)
        run.show_forecast(forecast, forecast_view(forecast))
        return
    outcome = compress_model(run.resolved, output, plan, overwrite, run.console)
    run.console.show(compressed_view(outcome))
    run.console.result(outcome.document(), str(outcome.output))
    made = shlex.quote(str(outcome.output))
    baseline = shlex.quote(run.settings.model.name)
    measuring = f"eval {made} --baseline {baseline}"
    run.console.next_command(f"hisvd {f'inspect {made}' if outcome.perplexity else measuring}")


def _recover(
    run: Run, checkpoint: Path, output: Path | None, overwrite: bool, dry_run: bool
) -> None:
    from hisvd_cli.cli.views.results import recovered_view, recovery_forecast_view
    from hisvd_cli.pipelines.recovering.from_checkpoint import forecast_recovery, recover_checkpoint
    from hisvd_cli.pipelines.unused_options import check_options

    check_options(run.resolved, "recover")
    if dry_run:
        forecast = forecast_recovery(run.resolved, checkpoint, output, overwrite, run.console)
        run.show_forecast(forecast, recovery_forecast_view(forecast), forecast["output"])
        return
    made = recover_checkpoint(run.resolved, checkpoint, output, overwrite, run.console)
    run.console.show(recovered_view(made))
    run.console.result(made, made["output"])
    models = [made["output"], str(checkpoint)]
    run.console.next_command(f"hisvd eval {shlex.join(models)}")


def _compress_grid(run: Run, output: Path | None, overwrite: bool, dry_run: bool) -> None:
    from hisvd_cli.cli.views.results import compressed_grid_view, forecast_grid_view
    from hisvd_cli.pipelines.compressing.grid.grid_runs import compress_grid, forecast_grid

    if dry_run:
        forecast = forecast_grid(run.resolved, output, overwrite, run.console)
        run.show_forecast(forecast, forecast_grid_view(forecast))
        return
    cells = compress_grid(run.resolved, output, overwrite, run.console)
    run.console.show(compressed_grid_view(cells))
    made = [str(cell.output) for cell in cells if not cell.failure]
    documents = [cell.document() for cell in cells]
    for document in documents:
        document["message"] = document["message"] and in_flags(document["message"])
    run.console.result({"cells": documents}, " ".join(made))
    failures = [cell.failure for cell in cells if cell.failure]
    if failures:
        raise joint_error(failures)
    baseline = shlex.quote(run.settings.model.name)
    run.console.next_command(f"hisvd eval {shlex.join(made)} --baseline {baseline}")
