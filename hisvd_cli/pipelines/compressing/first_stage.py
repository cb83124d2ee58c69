"""Prepares a compression: the calibrated and planned model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hisvd_cli.calibration.text.datasets import Text
from hisvd_cli.compression.updating import Update
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration import ensure_calibration
from hisvd_cli.pipelines.compressing.stages.stage import Stage
from hisvd_cli.pipelines.compressing.updates import prepare_update
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.texts import check_texts
from hisvd_cli.pipelines.planning.methods import compression_needs
from hisvd_cli.pipelines.planning.plan_files import open_plan
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.pipelines.recovering.recovery_checks import check_trains, wants_recovery
from hisvd_cli.utils.progress import Reporter


@dataclass(frozen=True)
class Prepared:
    """The inputs of a compression.

    Attributes:
        stage: the first stage.
        update: the update, if the settings name one.
        given: whether the plan was given, and is used for every stage.
        calibrating: seconds of the calibration.
        planning: seconds of planning.
    """

    stage: Stage
    update: Update | None
    given: bool
    calibrating: float
    planning: float


def prepare(
    resolved: Resolved,
    source: Source,
    plan_file: Path | None,
    text: Text | None,
    reporter: Reporter,
) -> Prepared:
    """Calibrate and plan a model; existing results are reused.

    Args:
        resolved: the settings.
        source: the model.
        plan_file: the given plan, if any.
        text: the text to evaluate on, if any.
        reporter: receives progress.

    Raises:
        DataError: the model is calibrated on the text to evaluate on.
        HisvdError: the calibration, the plan or the update fails.
    """
    given = open_plan(plan_file, source) if plan_file else None
    needs = compression_needs(resolved.settings, plans=given is None)
    calibration, calibrating = ensure_calibration(resolved, source, reporter, needs=needs)
    if text is not None:
        check_texts([text], calibration.manifest, source.name)
    update = prepare_update(resolved, source, calibration, reporter)
    started = time.monotonic()
    plan = given or make_plans(resolved, source, calibration, reporter)[0]
    planning = time.monotonic() - started
    if wants_recovery(resolved):
        check_trains(plan.ranks, resolved)
    stage = Stage(source, calibration, plan)
    return Prepared(stage, update, given is not None, calibrating, planning)
