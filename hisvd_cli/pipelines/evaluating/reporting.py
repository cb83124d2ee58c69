"""What is measured of models ─► reports, with what the models' own files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.compression.stage_times import times_of
from hisvd_cli.evaluation.grid import Grid
from hisvd_cli.evaluation.report.content import ModelFacts, Report, Spectra
from hisvd_cli.evaluation.report.page import check_libraries, render
from hisvd_cli.evaluation.report_tables import check_report_path, write_reports
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, is_checkpoint, open_checkpoint
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.cards import update_cards
from hisvd_cli.pipelines.evaluating.evaluation import evaluate_models, open_target
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.files.fingerprints import cache_root
from hisvd_cli.utils.files.tensorfile import read_tensors
from hisvd_cli.utils.files.text_output import takes_text, write_through
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions


def report_files(named: Mapping[str, Path | None]) -> list[Path | None]:
    """Return the files of reports, by flag, once it is sure that they can be written.

    Raises:
        UsageError: two reports have the same file, or a library for the page is missing.
        OutputError: see :func:`hisvd_cli.evaluation.report_tables.check_report_path`.
    """
    paths = {flag: path and output_name(path, flag) for flag, path in named.items()}
    for flag, path in paths.items():
        if path is not None:
            check_report_path(path, flag)
    files = [path.resolve() for path in paths.values() if path and not takes_text(path)]
    if len(set(files)) < len(files):
        raise UsageError("Two reports have the same name.", "Give each a file of its own.")
    if paths.get("--report") is not None:
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
    """Measure models, and write what was found to reports, and to the models' cards.

    Args:
        resolved: the settings.
        targets: see :func:`evaluate_models`.
        files: the files of --markdown, --csv and --report.
        reporter: told of progress.
        fresh: measure again what was measured before.
        update_card: whether the cards of checkpoints get the results.

    Raises:
        HisvdError: see :func:`report_files` and :func:`evaluate_models`.
    """
    markdown, table, page = report_files(files)
    grid = evaluate_models(resolved, targets, reporter, fresh)
    write_reports(grid, markdown, table)
    if page is not None:
        write_report(resolved, grid, page)
    if update_card:
        update_cards(grid)
    return grid


def write_report(resolved: Resolved, grid: Grid, path: Path) -> None:
    """Write the page of a run. Raises OutputError."""
    models = {each.model: _facts(resolved, each.model) for each in grid.rows()}
    report = Report(
        grid=grid,
        models=models,
        spectra=next(filter(None, map(_spectra, models.values())), None),
        settings=resolved.settings.model_dump(mode="json", include={"eval", "model"}),
        versions=versions(),
    )
    write_through(path, render(report))


def _facts(resolved: Resolved, model: str) -> ModelFacts:
    with open_target(resolved, model) as source:
        size = source.weights.total_bytes
        if not is_checkpoint(source.folder):
            return ModelFacts(model, size)
        file = source.folder / PLAN_FILE
        plan = load_plan(file) if file.is_file() else None
        record = open_checkpoint(source.folder).provenance
        return ModelFacts(model, size, plan, record, times_of(record))


def _spectra(facts: ModelFacts) -> Spectra | None:
    """Return the spectra that a checkpoint's plan looked at, or those of the weights, where they
    are in the cache."""
    fingerprint = part(facts.record, "model").get("fingerprint")
    key = part(facts.record, "calibration").get("key")
    if not isinstance(fingerprint, str):
        return None
    if isinstance(key, str):
        folder = cache_root() / "calibration"
        for path in sorted(folder.glob(f"*-{fingerprint[:12]}/*/spectra.safetensors")):
            if found := _read("whitened", path, key):
                return found
    path = cache_root() / "weights" / fingerprint / "spectra.safetensors"
    return _read("weight", path, fingerprint)


def _read(kind: str, path: Path, key: str) -> Spectra | None:
    try:
        tensors, metadata = read_tensors(path, "")
    except SourceError:  # absent, or damaged: the report does without
        return None
    if metadata.get("key") != key:
        return None
    return Spectra(kind, {name: tensor.tolist() for name, tensor in tensors.items()})
