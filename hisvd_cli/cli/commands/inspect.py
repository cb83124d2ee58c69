"""``hisvd inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from hisvd_cli.cli.options import Run, option, with_settings
from hisvd_cli.pipelines.config.commands import SETTINGS


@with_settings(SETTINGS["inspect"])
def inspect(
    run: Run,
    target: Annotated[
        str,
        typer.Argument(
            help="Checkpoint, .pt file (ours or foreign), plan.json, calibration, or model.",
            metavar="TARGET",
        ),
    ],
    check_values: Annotated[
        bool,
        option(
            "--check-values/--no-check-values",
            text="Read every tensor and check for NaN (default on).",
        ),
    ] = True,
) -> None:
    """Audit a checkpoint: ranks, sizes on disk, provenance, problems.

    Runs no code from the file. Exits with status 1 if it finds a problem.

    Example: hisvd inspect demo-0.6
    """
    from hisvd_cli.cli.views.results import audit_view
    from hisvd_cli.inspection.inspection import audit

    run.console.needs_stdout()
    model = run.settings.model
    found = audit(target, model.revision, model.trust_remote_code, check_values, run.console)
    run.console.show(audit_view(found, run.console.width, run.console.verbose))
    run.console.result(found.document(), found.line())
    if found.problems:
        raise typer.Exit(1)
