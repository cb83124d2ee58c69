"""Evaluates models and writes reports and model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hisvd_cli.evaluation.grid import Grid
from hisvd_cli.evaluation.report.content import Report
from hisvd_cli.evaluation.report.page import check_libraries, render
from hisvd_cli.evaluation.report_tables import check_report_path, write_reports
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.cards import check_cards, update_cards
from hisvd_cli.pipelines.evaluating.evaluation import evaluate_models
from hisvd_cli.pipelines.evaluating.model_facts import cached_spectra, model_facts
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.unused_options import check_options
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.text_output import takes_text, write_through
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions


def report_files(named: Mapping[str, Path | None]) -> list[Path | None]:
    """Return the files of reports, after checking that they can be written.

    Args:
        named: ``markdown``, ``csv`` and ``report`` → the file, None without that report.

    Raises:
        UsageError: two reports have the same file, or a library for the page is missing.
        OutputError: see :func:`hisvd_cli.evaluation.report_tables.check_report_path`.
    """
    paths = {name: path and output_name(path, name) for name, path in named.items()}
    for name, path in paths.items():
        if path is not None:
            check_report_path(path, name)
    files = [path.resolve() for path in paths.values() if path and not takes_text(path)]
    if len(set(files)) < len(files):
        raise UsageError("Two reports have the same name.", "Give each report its own file.")
    if paths.get("report") is not None:
        check_libraries()
    return list(paths.values())


def evaluate_into(
    resolved: Resolved,
    targets: Sequence[str],
    files: Mapping[str, Path | None],
    reporter: Reporter,
    *,
    fresh: bool,
    update_card: bool,
) -> Grid:
    """Evaluate models and write the results to reports and model cards.

    Args:
        resolved: the settings.
        targets: see :func:`evaluate_models`.
        files: see :func:`report_files`.
        reporter: receives progress.
        fresh: ignore stored results.
        update_card: whether to write the results to the cards of checkpoints.

    Raises:
        HisvdError: see :func:`check_options`, :func:`report_files` and :func:`evaluate_models`.
    """
    check_options(resolved, "evaluate")
    markdown, table, page = report_files(files)
    if update_card:
        check_cards(targets)
    grid = evaluate_models(resolved, targets, reporter, fresh)
    write_reports(grid, markdown, table)
    if page is not None:
        write_report(resolved, grid, page)
    if update_card:
        update_cards(grid)
    return grid


def write_report(resolved: Resolved, grid: Grid, path: Path) -> None:
    """Write the HTML report. Raises OutputError."""
    models = {each.model: model_facts(resolved, each.model) for each in grid.rows()}
    report = Report(
        grid=grid,
        models=models,
        spectra=next(filter(None, map(cached_spectra, models.values())), None),
        settings=resolved.settings.model_dump(mode="json", include={"eval", "model"}),
        versions=versions(),
    )
    write_through(path, render(report))
