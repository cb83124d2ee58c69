"""Rounds of truncation and correction (ZS-SVD, arXiv 2602.02848).

N stages have N − 1 corrections. Every stage truncates to the full ratio. A later stage plans and
truncates the corrected model, with statistics of that model on the same tokens; a given plan is
used for every stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration, Sample
from hisvd_cli.modeling.corrected import corrected
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration_runs import calibrate_again
from hisvd_cli.pipelines.compressing.stages.corrections import correct
from hisvd_cli.pipelines.compressing.stages.stage import Stage, factored
from hisvd_cli.pipelines.compressing.stages.stage_folders import StageFolders, stage_folders
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.methods import compression_needs
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.pipelines.samples import calibrated_dtype, calibration_sample
from hisvd_cli.pipelines.sealing import seal_together, sealed_together
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.progress import Reporter

Seconds = dict[str, float]


@contextmanager
def last_stage(
    resolved: Resolved, first: Stage, fixed: bool, output: Path, reporter: Reporter
) -> Iterator[tuple[Stage, Seconds]]:
    """Run all stages but the last; yield the last stage, and the seconds that the others took.

    An interrupted run resumes at the stage and block where it stopped.

    Args:
        resolved: the settings.
        first: the first stage.
        fixed: whether its plan was given, and is used for every stage.
        output: path of the checkpoint; results of stages are removed once the body has written it.
        reporter: receives progress.
    """
    seconds = dict.fromkeys(("calibrate", "plan", "decompose", "write"), 0.0)
    if resolved.settings.compress.stages == 1:
        yield first, seconds
        return
    with stage_folders(resolved, first, output) as folders:
        yield _Stages(resolved, first, fixed, folders, reporter, seconds).run(), seconds


@dataclass(frozen=True)
class _Stages:
    """All stages but the last."""

    resolved: Resolved
    first: Stage
    fixed: bool
    folders: StageFolders
    reporter: Reporter
    seconds: Seconds

    def run(self) -> Stage:
        """Return the last stage."""
        count, here = self.resolved.settings.compress.stages, world()
        done = here.agreed(lambda: self.folders.finished(count))
        text = self.first.calibration
        sample = here.agreed(
            lambda: calibration_sample(self.resolved, self.first.source, text, self.reporter)
        )
        stage = self.first
        if not done:
            self.folders.keep_plan(1, stage.plan)
        for number in range(done + 1, count + 1):
            if number > 1:
                stage = self._next(number, sample)
            if number < count:
                self.reporter.note(f"Stage {number} of {count}.")
                self._truncate(number, stage)
                self._correct(number, stage, sample)
                if here.first:
                    self.folders.tidy(number)
                here.wait()
        self.reporter.note(f"Stage {count} of {count}.")
        return replace(stage, history=self._history(count))

    def _next(self, number: int, sample: Sample) -> Stage:
        """Return the next stage: the corrected model, calibrated and planned."""
        source = corrected(self.first.source, self.folders.corrected(number - 1))
        needs = compression_needs(self.resolved.settings, plans=not self.fixed)
        started = time.monotonic()
        calibration = calibrate_again(
            self.resolved,
            source,
            sample,
            self.folders.calibration(number),
            calibrated_dtype(self.resolved, self.first.calibration),
            needs,
            self.reporter,
        )
        calibrated = time.monotonic()
        self.seconds["calibrate"] += calibrated - started
        plan = self._planned(number, source, calibration)
        self.seconds["plan"] += time.monotonic() - calibrated
        return Stage(source, calibration, plan)

    def _planned(self, number: int, source: Source, calibration: Calibration) -> Plan:
        if self.fixed:
            plan = self.first.plan
        elif self.folders.has_plan(number):
            return self.folders.plan(number)
        else:
            ratio = [self.first.plan.ratio]
            plan = make_plans(self.resolved, source, calibration, self.reporter, ratio)[0]
        self.folders.keep_plan(number, plan)
        return plan

    def _truncate(self, number: int, stage: Stage) -> None:
        folder = self.folders.checkpoint(number)
        if sealed_together(folder):
            return
        made = factored(self.resolved, stage, folder, self.reporter)
        seal_together(folder)
        self.seconds["decompose"] += made.decompose_seconds
        self.seconds["write"] += made.write_seconds

    def _correct(self, number: int, stage: Stage, sample: Sample) -> None:
        started = time.monotonic()
        made, folder = self.folders.checkpoint(number), self.folders.corrected(number)
        correct(self.resolved, self.first, stage, made, folder, number, sample, self.reporter)
        self.seconds["calibrate"] += time.monotonic() - started

    def _history(self, count: int) -> dict[str, Any]:
        """Return the entries of the provenance: the original's calibration, and every stage."""
        made = self.first.calibration
        needs = compression_needs(self.resolved.settings, plans=False)
        plans = [self.folders.plan(number) for number in range(1, count + 1)]
        return {
            "calibration": made.manifest,
            "gradients": made.gradients if needs - {"moments"} else None,
            "stages": [
                {
                    "kept_parameters": plan.kept_parameters,
                    "low_rank_sublayers": len(plan.ranks),
                    "predicted_loss": plan.predicted_loss,
                    "statistics": plan.provenance["calibration"],
                    "correction": self.resolved.settings.compress.correction
                    if number < count
                    else None,
                }
                for number, plan in enumerate(plans, 1)
            ],
        }
