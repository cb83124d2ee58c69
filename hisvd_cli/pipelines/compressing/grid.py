"""Settings of several presets or ratios ─► a checkpoint of each, from one calibration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.evaluation.grid import Failure
from hisvd_cli.inspection.audit import part
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, is_checkpoint, open_checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration import ensure_calibration, named_source
from hisvd_cli.pipelines.calibration_search import find_calibration
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.compressing.compression_checks import check_request
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.evaluation import tolerated
from hisvd_cli.pipelines.forecast import forecast_compression
from hisvd_cli.pipelines.output_names import check_form
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.pipelines.planning.methods import decomposer_needs, plan_needs
from hisvd_cli.pipelines.recovering.recovery_checks import wants_recovery
from hisvd_cli.pipelines.recovering.recovery_texts import reads_the_same
from hisvd_cli.pipelines.samples import is_text_of
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import OutputError, UsageError
from hisvd_cli.utils.files.fingerprints import expanded, ratio_name, slug
from hisvd_cli.utils.progress import Reporter

_MEMORY_HINT = "Give `model.max_memory` or a preset that runs no model; the same command resumes."


@dataclass(frozen=True)
class Cell:
    """One checkpoint of a grid.

    Attributes:
        resolved: its settings, of one preset at most and one ratio.
        output: its folder.
        outcome: what was made now; None where it was there before, or failed.
        failure: why it failed.
    """

    resolved: Resolved
    output: Path
    outcome: Outcome | None = None
    failure: Failure | None = None

    @property
    def preset(self) -> str | None:
        """Its preset, if there is one."""
        return next(iter(self.resolved.settings.plan.preset), None)

    @property
    def ratio(self) -> float:
        """Its keep ratio."""
        return self.resolved.settings.plan.ratio[0]

    @property
    def status(self) -> str:
        """Say what became of it: made, kept (it was there before), or failed."""
        return "failed" if self.failure else "made" if self.outcome else "kept"

    @property
    def bytes(self) -> int:
        """Bytes of its weights, 0 where it failed."""
        return sum(path.stat().st_size for path in self.output.glob("*.safetensors"))

    def plan(self) -> Plan | None:
        """Return its plan; None where it failed."""
        return None if self.failure else load_plan(self.output / PLAN_FILE)

    def document(self) -> dict[str, Any]:
        """Return it as JSON data: as a compression's document, with what became of it."""
        plan, made = self.plan(), self.outcome.document() if self.outcome else {}
        return {
            "output": str(self.output),
            "preset": self.preset,
            "ratio": self.ratio,
            "status": self.status,
            "model_ratio": plan.model_ratio if plan else None,
            "kept_parameters": plan.kept_parameters if plan else None,
            "bytes": self.bytes if plan else None,
            "seconds": made.get("seconds"),
            "peak_memory_bytes": made.get("peak_memory_bytes"),
            "plan": str(self.output / PLAN_FILE) if plan else None,
            "perplexity": made.get("perplexity"),
            "message": self.failure.message if self.failure else None,
        }


def is_grid(resolved: Resolved) -> bool:
    """Tell whether several checkpoints are asked for; a bytes ratio asks for one.

    Raises:
        UsageError: see :func:`hisvd_cli.pipelines.planning.byte_budgets.bytes_ratio`.
    """
    return bytes_ratio(resolved) is None and len(resolved.cells()) > 1


def grid_cells(resolved: Resolved, output: Path | None) -> list[Cell]:
    """Return the cells of a grid, as MODEL-PRESET-RATIO in ``output``, or in the current folder.

    Raises:
        UsageError: ``output`` is to be one file.
        OutputError: a file stands there.
    """
    if output is not None and output.suffix == ".pt":
        raise UsageError(
            f"`output` {output} is a single file, but several checkpoints were requested.",
            "Name a folder for all of them.",
        )
    if output is not None:
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output} is a file.", "Name a folder for all checkpoints.")
        check_form(output)
    model = slug(resolved.settings.model.name)
    cells = []
    for one in resolved.cells():
        words = [model, *one.settings.plan.preset, ratio_name(one.settings.plan.ratio[0])]
        cells.append(Cell(one, (output or Path()) / "-".join(words)))
    return cells


def compress_grid(
    resolved: Resolved, output: Path | None, overwrite: bool, reporter: Reporter
) -> list[Cell]:
    """Make every checkpoint that is not there yet; one that fails leaves the others.

    What can be known before any work stops the run there: wrong settings, and checkpoints in the
    way that were made with others. Of several processes, a failure ends all.

    Raises:
        HisvdError: see :func:`check_request`; or the calibration that all share fails.
    """
    source = named_source(resolved)
    cells = grid_cells(resolved, output)
    left = _left(cells, source, overwrite, reporter, find_calibration(resolved, source, reporter))
    if left:
        shared, _ = ensure_calibration(resolved, source, reporter, needs=_needs(left))
        for cell in cells:
            if cell not in left:  # a text may have changed under the same name
                _check_same(cell, source, shared)
    done = []
    for cell in cells:
        failures: list[Failure] = []
        outcome = None
        if cell in left:
            with tolerated(str(cell.output), failures, world().size > 1, _MEMORY_HINT):
                by = _calibrated_by(shared, cell.resolved)
                outcome = compress_model(by, cell.output, None, overwrite, reporter)
        done.append(Cell(cell.resolved, cell.output, outcome, next(iter(failures), None)))
    return done


def forecast_grid(
    resolved: Resolved, output: Path | None, overwrite: bool, reporter: Reporter
) -> dict[str, Any]:
    """Return what the cells that are left would take. Does no work.

    Raises:
        HisvdError: whatever would stop the real run before its work.
    """
    source = named_source(resolved)
    cells = grid_cells(resolved, output)
    left = _left(cells, source, overwrite, reporter, find_calibration(resolved, source, reporter))
    forecasts = [
        forecast_compression(each.resolved, each.output, None, overwrite, reporter) for each in left
    ]
    # All cells share one calibration, that of the one that needs the most.
    calibrating = [each["stages"]["calibrate"] for each in forecasts]
    seconds = sum(each["seconds"] for each in forecasts) - sum(calibrating)
    return {"cells": forecasts, "seconds": seconds + max(calibrating, default=0.0)}


def _needs(cells: Sequence[Cell]) -> Collection[Need]:
    each = [cell.resolved.settings for cell in cells]
    return {need for s in each for need in decomposer_needs(s.compress) | plan_needs(s)}


def _calibrated_by(calibration: Calibration, resolved: Resolved) -> Resolved:
    """Return settings that name the calibration: the newest one may be another by then."""
    found = {"path": str(calibration.folder)}
    named = resolved.settings.calibration.model_copy(update=found)
    settings = resolved.settings.model_copy(update={"calibration": named})
    return replace(resolved, settings=settings)


def _left(
    cells: Sequence[Cell],
    source: Source,
    overwrite: bool,
    reporter: Reporter,
    calibration: Calibration | None,
) -> list[Cell]:
    """Return the cells that are to be made; refuse those that cannot."""
    left = []
    for cell in cells:
        if not overwrite and is_checkpoint(cell.output):
            _check_same(cell, source, calibration)
            reporter.note(f"{cell.output} exists already.")
            continue
        check_request(cell.resolved, source, cell.output, None, overwrite)
        left.append(cell)
    return left


def _check_same(cell: Cell, source: Source, calibration: Calibration | None) -> None:
    """Refuse a checkpoint that is not what the cell would be made into. Raises OutputError."""
    record = open_checkpoint(cell.output).provenance
    made_with, wanted = part(record, "settings"), cell.resolved.recorded()
    differs = [
        f"{section}.{key}"
        for section in ("plan", "compress", "quantize", "calibration")
        for key in {**wanted[section], **part(made_with, section)}
        if part(made_with, section).get(key) != wanted[section].get(key)
    ]
    trained = part(part(part(record, "recovery"), "settings"), "recover")
    if trained.get("method", "none") != wanted["recover"]["method"] or (
        trained and trained != wanted["recover"]
    ):
        differs.append("recover")
    if part(made_with, "model").get("dtype") != wanted["model"]["dtype"]:
        differs.append("model.dtype")
    if part(record, "model").get("fingerprint") != source.fingerprint:
        differs = ["model"]
    elif calibration and part(record, "calibration").get("key") != calibration.key:
        differs.append("calibration")
    differs += _changed_texts(cell, source, record)
    if differs:
        raise OutputError(
            f"{cell.output} was made with other settings: {', '.join(differs)}.",
            "Pass `overwrite`, or name another `output`.",
        )


def _changed_texts(cell: Cell, source: Source, record: Mapping[str, Any]) -> list[str]:
    """Return which texts read otherwise now than when a checkpoint was made, under the same name.

    Raises:
        DataError: one cannot be read.
    """
    changed = []
    dataset, data = cell.resolved.settings.calibration.dataset, part(record, "calibration")
    if expanded(dataset).is_file() and not is_text_of(dataset, part(data, "data")):
        changed.append(f"the text of {dataset}")
    if wants_recovery(cell.resolved) and not reads_the_same(cell.resolved, source, record):
        changed.append("the training text")
    return changed
