"""``hisvd calibrate``."""

from __future__ import annotations

from hisvd_cli.cli.options import DryRun, Run, with_settings
from hisvd_cli.pipelines.config.commands import SETTINGS


@with_settings(SETTINGS["calibrate"], together=True)
def calibrate(run: Run, dry_run: DryRun = False) -> None:
    """Collect activation statistics of a model on text, one block at a time.

    Example: hisvd calibrate --model HuggingFaceTB/SmolLM2-135M --samples 64 --seqlen 1024
    """
    from hisvd_cli.cli.views.results import calibration_view, forecast_view
    from hisvd_cli.modeling.structure.tensors import tell_notes
    from hisvd_cli.pipelines.calibration import ensure_calibration
    from hisvd_cli.pipelines.forecasts.calibration import forecast_calibration
    from hisvd_cli.pipelines.named_source import named_source

    source = named_source(run.resolved)
    tell_notes(source, run.console)
    if dry_run:
        forecast = forecast_calibration(run.resolved, source)
        run.show_forecast(forecast, forecast_view(forecast))
        return
    made, seconds = ensure_calibration(run.resolved, source, run.console, reuse_any=False)
    run.console.show(calibration_view(made, seconds))
    document = {
        "output": str(made.folder),
        "seconds": seconds,
        **made.manifest,
        "gradients": made.gradients,
    }
    run.console.result(document, str(made.folder))
    flags = run.resolved.flags("model", "calibration")
    run.console.next_command(f"hisvd plan {flags} --ratio 0.8")
