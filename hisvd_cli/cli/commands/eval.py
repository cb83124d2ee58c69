"""``hisvd eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hisvd_cli.cli.options import Run, keys_of, option, with_settings
from hisvd_cli.utils.errors import HisvdError, UsageError

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
    from hisvd_cli.evaluation.report.page import check_libraries
    from hisvd_cli.evaluation.report_tables import write_reports
    from hisvd_cli.pipelines.evaluating.cards import update_cards
    from hisvd_cli.pipelines.evaluating.evaluation import evaluate_models
    from hisvd_cli.pipelines.evaluating.reporting import write_report

    markdown, csv, report = _reports({"--markdown": markdown, "--csv": csv, "--report": report})
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


def _reports(named: dict[str, Path | None]) -> list[Path | None]:
    """Return the files of reports, by flag, once it is sure that they can be written.

    Raises:
        UsageError: two reports have the same file.
        OutputError: see :func:`hisvd_cli.evaluation.report_tables.check_report_path`.
    """
    from hisvd_cli.evaluation.report_tables import check_report_path
    from hisvd_cli.pipelines.output_names import output_name
    from hisvd_cli.utils.files.text_output import takes_text

    paths = {flag: path and output_name(path, flag) for flag, path in named.items()}
    for flag, path in paths.items():
        if path is not None:
            check_report_path(path, flag)
    files = [path.resolve() for path in paths.values() if path and not takes_text(path)]
    if len(set(files)) < len(files):
        raise UsageError("Two reports have the same name.", "Give each a file of its own.")
    return list(paths.values())
