"""``hisvd eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from hisvd_cli.options import Run, keys_of, with_settings

_MODEL = [key for key in keys_of("model") if key[1] != "name"]


@with_settings([*keys_of("eval"), *_MODEL])
def evaluate(
    run: Run,
    target: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, .pt file, or any model.", metavar="MODEL", show_default=False
        ),
    ] = None,
) -> None:
    """Measure perplexity, of a compressed or of any model.

    Example: hisvd eval demo-0.6 --baseline demo
    """
    from hisvd_cli.build.evaluation import evaluate_model
    from hisvd_cli.views import evaluation_view

    outcome = evaluate_model(run.resolved, target or run.settings.model.name, run.console)
    run.console.show(evaluation_view(outcome))
    run.console.result(outcome.document(), outcome.line())
