"""``hisvd eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hisvd_cli.errors import HisvdError
from hisvd_cli.options import Run, keys_of, option, with_settings

_MODEL = [key for key in keys_of("model") if key[1] != "name"]


@with_settings([*keys_of("eval"), *_MODEL])
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
            text="Also write an HTML page with tables, figures and settings.",
            metavar="FILE",
        ),
    ] = None,
    update_card: Annotated[
        bool,
        option("--update-card", text="Put the results into the model cards of checkpoints."),
    ] = False,
    fresh: Annotated[
        bool, option("--fresh", text="Measure again what was measured before.")
    ] = False,
) -> None:
    """Measure perplexity and divergence, of compressed or of any models.

    Example: hisvd eval demo-0.8 demo-0.6 --baseline demo
    """
    from hisvd_cli.build.cards import update_cards
    from hisvd_cli.build.evaluation import evaluate_models
    from hisvd_cli.build.reporting import write_report
    from hisvd_cli.evaluation_views import grid_view
    from hisvd_cli.report.page import check_libraries
    from hisvd_cli.report_tables import check_report_path, write_reports

    check_report_path(markdown, "--markdown")
    check_report_path(csv, "--csv")
    check_report_path(report, "--report")
    if report is not None:
        check_libraries()
    named = targets or [run.settings.model.name]
    grid = evaluate_models(run.resolved, named, run.console, fresh)
    write_reports(grid, markdown, csv)
    if report is not None:
        write_report(run.resolved, grid, report)
    if update_card:
        update_cards(grid)
    run.console.show(grid_view(grid))
    run.console.result(grid.document(), grid.line())
    if grid.failures:
        told = [f"{each.model}: {each.message}" for each in grid.failures]
        raise HisvdError("\n".join(told), grid.failures[0].hint)
