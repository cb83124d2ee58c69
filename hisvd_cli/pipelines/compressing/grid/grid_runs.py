"""Compresses a model with each of several presets and ratios, from one calibration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hisvd_cli.calibration.store import Calibration
from hisvd_cli.evaluation.grid import Failure
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.pipelines.calibration import ensure_calibration
from hisvd_cli.pipelines.calibration_search import find_calibration
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.compressing.grid.cells import Cell, grid_cells
from hisvd_cli.pipelines.compressing.grid.existing_checkpoints import check_same, missing_cells
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.failures import recorded_failure
from hisvd_cli.pipelines.forecasts.compression import forecast_compression
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.planning.methods import compression_needs
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.progress import Reporter

_MEMORY_HINT = "Give `model.max_memory` or a preset that runs no model; the same command resumes."


def compress_grid(
    resolved: Resolved, output: Path | None, overwrite: bool, reporter: Reporter
) -> list[Cell]:
    """Make every checkpoint of a grid that does not exist yet.

    Wrong settings, and existing checkpoints made with other settings, stop the run before any work.
    If one checkpoint fails later, the others are still made; with several processes, a failure ends
    the run.

    Raises:
        HisvdError: see :func:`check_request`; or the common calibration fails.
    """
    source = named_source(resolved)
    cells = grid_cells(resolved, output)
    found = find_calibration(resolved, source, reporter)
    missing = missing_cells(cells, source, overwrite, reporter, found)
    if missing:
        shared, _ = ensure_calibration(resolved, source, reporter, needs=_needs(missing))
        for cell in cells:
            if cell not in missing:  # the calibration may have a changed text of the same name
                check_same(cell, source, shared)
    done = []
    for cell in cells:
        failures: list[Failure] = []
        outcome = None
        if cell in missing:
            with recorded_failure(str(cell.output), failures, world().size > 1, _MEMORY_HINT):
                by = _with_calibration(cell.resolved, shared)
                outcome = compress_model(by, cell.output, None, overwrite, reporter)
        done.append(Cell(cell.resolved, cell.output, outcome, next(iter(failures), None)))
    return done


def forecast_grid(
    resolved: Resolved, output: Path | None, overwrite: bool, reporter: Reporter
) -> dict[str, Any]:
    """Return what the missing cells would take. Does no work.

    Raises:
        HisvdError: any error that would stop the real run before its work.
    """
    source = named_source(resolved)
    cells = grid_cells(resolved, output)
    found = find_calibration(resolved, source, reporter)
    forecasts = [
        forecast_compression(each.resolved, each.output, None, overwrite, reporter)
        for each in missing_cells(cells, source, overwrite, reporter, found)
    ]
    # All cells share one calibration: count the longest.
    calibrating = [each["stages"]["calibrate"] for each in forecasts]
    seconds = sum(each["seconds"] for each in forecasts) - sum(calibrating)
    return {"cells": forecasts, "seconds": seconds + max(calibrating, default=0.0)}


def _needs(cells: Sequence[Cell]) -> Collection[Need]:
    each = [cell.resolved.settings for cell in cells]
    return {need for s in each for need in compression_needs(s, plans=True)}


def _with_calibration(resolved: Resolved, calibration: Calibration) -> Resolved:
    """Return settings that name the calibration, so that no newer one is used."""
    found = {"path": str(calibration.folder)}
    named = resolved.settings.calibration.model_copy(update=found)
    settings = resolved.settings.model_copy(update={"calibration": named})
    return replace(resolved, settings=settings)
