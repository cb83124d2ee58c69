"""Evaluation results as CSV and as a markdown table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hisvd_cli.evaluation.grid import Grid
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.zero_shot import Score
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.escaping import markdown_code, markdown_text, spreadsheet_cell
from hisvd_cli.utils.files.text_output import check_text_place, takes_text, write_through
from hisvd_cli.utils.quantities import counted

FIGURES = {
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "kl": ("KL", "{:.4f}"),
    "agreement": ("agreement", "{:.3f}"),
}
"""Title and number format of each figure in tables."""
_REPORTS = {
    "markdown": rb"\| model \| dataset \| perplexity \| bits/byte \| KL \| agreement \|",
    "csv": rb"model,dataset,perplexity,perplexity_low,perplexity_high,bits_per_byte,",
    "report": rb"<!DOCTYPE html>\n(?s:.*)\n<title>hisvd: ",
}
"""How each kind of report begins, in earlier versions too."""
_BEGINNING = 1000
_TASK_FACTS = ("metric", "filter", "value", "stderr", "num_fewshot", "questions")
_FACTS = ("split", "tokens", "bytes", "windows", "seqlen", "dataset_hash")


def check_report_path(path: Path, kind: str) -> None:
    """Check before any work that a report can be written; only an earlier report is overwritten.

    Args:
        path: the file.
        kind: ``markdown``, ``csv`` or ``report``, the argument that names it.

    Raises:
        OutputError: see :func:`check_text_place`; or the file is not a report of this kind.
    """
    check_text_place(path, kind)
    if path.is_file() and not takes_text(path):
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
        if beginning and not re.match(_REPORTS[kind], beginning):
            raise OutputError(
                f"`{kind}={path}` exists and is not a report of this kind.",
                "Choose another file, or remove this one.",
            )


def write_reports(grid: Grid, markdown: Path | None, table: Path | None) -> None:
    """Write the requested reports. Raises OutputError."""
    if markdown is not None:
        write_through(markdown, markdown_table(grid))
    if table is not None:
        write_through(table, csv_table(grid))


def csv_table(grid: Grid) -> str:
    """Return CSV with a row for each model and text, the baseline first, then one for each model,
    task and metric. Intervals have columns for their bounds; unknown values are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bounds = [f"{figure}{end}" for figure in FIGURES for end in ("", "_low", "_high")]
    rows: list[list[object]] = []
    rows.append(["model", "dataset", *bounds, *_FACTS, *_TASK_FACTS])
    for model, result in _rows(grid):
        cells: list[object] = [model, result.dataset]
        for figure in FIGURES:
            low, high = (result.intervals or {}).get(figure) or (None, None)
            cells += [getattr(result, figure), low, high]
        cells += [getattr(result, fact) for fact in _FACTS]
        rows.append([*cells, *("" for _ in _TASK_FACTS)])
    blank = [""] * (len(bounds) + len(_FACTS))
    for model, found in _scores(grid):
        facts = [getattr(found, fact) for fact in _TASK_FACTS]
        rows.append([model, found.task, *blank, *facts])
    writer.writerows(map(spreadsheet_cell, row) for row in rows)
    return out.getvalue()


def markdown_table(grid: Grid) -> str:
    """Return a table with a row for each model and text, the baseline first, with intervals."""
    head = ["model", "dataset", *(title for title, _ in FIGURES.values())]
    lines = [_line(head), "|---" * 2 + "|---:" * len(FIGURES) + "|"]
    for model, result in _rows(grid):
        cells = [figure_text(result, figure, form) for figure, (_, form) in FIGURES.items()]
        text = markdown_text(f"{result.dataset} ({result.split})")
        lines.append(_line([markdown_code(model, in_table=True), text, *cells]))
    rows = _rows(grid)
    for _, result in rows:
        made = result.bootstrap or {}
        lines += ["", f"{counted(result.windows, 'window')} of {result.seqlen} tokens; "]
        lines[-1] += f"in parentheses {made['level']:.0%} bootstrap intervals "
        lines[-1] += f"({made['units']} {made['unit']})."
        break
    return "\n".join(lines + _task_lines(grid)) + "\n"


def _task_lines(grid: Grid) -> list[str]:
    """Return the lines of a table of all task scores, or no lines."""
    lines = []
    for model, found in _scores(grid):
        value = "not finite" if found.value is None else f"{found.value:.4f}"
        value += "" if found.stderr is None else f" ± {found.stderr:.4f}"
        shots = "" if found.num_fewshot is None else str(found.num_fewshot)
        cells = (markdown_text(found.task), shots, markdown_text(found.measure), value)
        lines.append(_line([markdown_code(model, in_table=True), *cells]))
    head = ["", _line(["model", "task", "few-shot", "metric", "value"]), "|---|---|---:|---|---:|"]
    return head + lines if lines else []


def _rows(grid: Grid) -> Iterator[tuple[str, PerplexityResult]]:
    for each in grid.rows():
        yield from ((each.model, result) for result in each.results)


def _scores(grid: Grid) -> Iterator[tuple[str, Score]]:
    for each in grid.rows():
        yield from ((each.model, score) for score in each.scores or ())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure_text(result: PerplexityResult, figure: str, form: str) -> str:
    """Return a figure with its interval; empty if it was not measured."""
    value, bounds = getattr(result, figure), (result.intervals or {}).get(figure)
    if value is None:
        return "not finite" if figure == "perplexity" else ""
    text = form.format(value)
    return text + (f" ({form.format(bounds[0])}–{form.format(bounds[1])})" if bounds else "")
