"""``hisvd inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from hisvd_cli.options import MODEL_KEYS, Run, with_settings

_KEYS = [key for key in MODEL_KEYS if key[1] in ("revision", "trust_remote_code")]


@with_settings(_KEYS)
def inspect(
    run: Run,
    target: Annotated[
        str,
        typer.Argument(
            help="Checkpoint, .pt file (ours or foreign), plan.json, calibration, or model."
        ),
    ],
    check_values: Annotated[
        bool,
        typer.Option(
            "--check-values/--no-check-values", help="Read every tensor and look for NaN."
        ),
    ] = True,
) -> None:
    """Audit what is on disk: ranks, true sizes, provenance, problems. Runs no code from a file.

    Example: hisvd inspect demo-0.6
    """
    from hisvd_cli.inspection import audit
    from hisvd_cli.views import audit_view

    model = run.settings.model
    found = audit(target, model.revision, model.trust_remote_code, check_values, run.console)
    run.console.show(audit_view(found, run.console.width))
    run.console.result(found.document(), found.kind)
    if found.problems:
        raise typer.Exit(1)
