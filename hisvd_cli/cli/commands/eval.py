"""``hisvd eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hisvd_cli.cli.console import joint_error
from hisvd_cli.cli.options import Run, option, with_settings
from hisvd_cli.pipelines.config.commands import SETTINGS
from hisvd_cli.pipelines.config.mentions import in_flags

if TYPE_CHECKING:
    from hisvd_cli.evaluation.grid import Grid


@with_settings(SETTINGS["evaluate"])
def evaluate(
    run: Run,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoint folders, .pt files, or any models.",
            metavar="MODEL...",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        Path | None, option("--markdown", text="Also write a markdown table.", metavar="FILE")
    ] = None,
    csv: Annotated[Path | None, option("--csv", text="Also write CSV.", metavar="FILE")] = None,
    report: Annotated[
        Path | None,
        option(
            "--report",
            text="Also write an HTML report with tables, figures and settings.",
            metavar="FILE",
        ),
    ] = None,
    update_card: Annotated[
        bool,
        option("--update-card", text="Add the results to the model cards of the checkpoints."),
    ] = False,
    fresh: Annotated[bool, option("--fresh", text="Ignore cached results.")] = False,
) -> None:
    """Measure perplexity and divergence of compressed or other models.

    Example: hisvd eval demo-0.8 demo-0.6 --baseline demo
    """
    from hisvd_cli.cli.views.evaluations import grid_view
    from hisvd_cli.pipelines.evaluating.reporting import evaluate_into

    files = {"markdown": markdown, "csv": csv, "report": report}
    run.console.needs_stdout(update_card, *files.values())
    models = targets or [run.settings.model.name]
    grid = evaluate_into(
        run.resolved, models, files, run.console, fresh=fresh, update_card=update_card
    )
    run.console.show(grid_view(grid))
    run.console.result(_document(grid), grid.line())
    if grid.failures:
        raise joint_error(grid.failures)


def _document(grid: Grid) -> dict[str, Any]:
    document = grid.document()
    for failure in document.get("failures", []):
        failure["message"] = in_flags(failure["message"])
    return document
