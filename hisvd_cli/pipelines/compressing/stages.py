"""Settings ─► stages: truncate to the full ratio, correct what was truncated, and again (ZS-SVD,
arXiv 2602.02848).

N stages have N − 1 corrections. A later stage sees the corrected model: its statistics, taken on
the same tokens, and its weights are what it plans and truncates by. A given plan is that of every
stage. Each stage but the last leaves its plan and its corrected weights in a hidden folder beside
the output, which goes when the checkpoint is there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.calibration.store import Calibration, Sample
from hisvd_cli.modeling.corrected import corrected
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration import calibrate_again
from hisvd_cli.pipelines.compressing.stage import Stage, factored
from hisvd_cli.pipelines.compressing.stage_corrections import correct, seal_folder
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.methods import decomposer_needs, plan_needs
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.pipelines.samples import calibrated_dtype, calibration_sample
from hisvd_cli.utils.distributed import building_together, world
from hisvd_cli.utils.files.checksums import seal, sealed
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.progress import Reporter

Seconds = dict[str, float]
_PLAN = "plan.json"


@contextmanager
def last_stage(
    resolved: Resolved, first: Stage, fixed: bool, output: Path, reporter: Reporter
) -> Iterator[tuple[Stage, Seconds]]:
    """Run all stages but the last; yield that one, and the seconds that all before it took.

    A run that was interrupted goes on at the stage and block where it stopped.

    Args:
        resolved: the settings.
        first: the first stage.
        fixed: whether its plan was given, and is that of every stage.
        output: where the checkpoint goes; what stages leave is removed once the body has written
            it.
        reporter: told of progress.
    """
    seconds = dict.fromkeys(("calibrate", "plan", "decompose", "write"), 0.0)
    if resolved.settings.compress.stages == 1:
        yield first, seconds
        return
    described = json.dumps([resolved.recorded(), first.plan.document()], sort_keys=True)
    made_from = first.calibration
    key = digest(described, first.source.fingerprint, made_from.key, made_from.gradients_key)
    folder = output.with_name(f".{output.name}.stages")
    with building_together(folder, key) as home:
        yield _Stages(resolved, first, fixed, home, reporter, seconds).run(), seconds
    if world().first:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class _Stages:
    """All stages but the last. Stage number i, from 1 on, has the folder ``stage-i``, with its
    plan, its calibration (but for the first), its checkpoint, and then its weights, corrected."""

    resolved: Resolved
    first: Stage
    fixed: bool
    home: Path
    reporter: Reporter
    seconds: Seconds

    def run(self) -> Stage:
        """Return the last stage."""
        count, here = self.resolved.settings.compress.stages, world()
        done = here.agreed(lambda: self._done(count))
        text = self.first.calibration
        sample = here.agreed(
            lambda: calibration_sample(self.resolved, self.first.source, text, self.reporter)
        )
        stage = self.first
        if not done:
            self._keep_plan(1, stage.plan)
        for number in range(done + 1, count + 1):
            if number > 1:
                stage = self._next(number, sample)
            if number < count:
                self.reporter.note(f"Stage {number} of {count}.")
                self._truncate(number, stage)
                self._correct(number, stage, sample)
                if here.first:
                    self._tidy(number)
                here.wait()
        self.reporter.note(f"Stage {count} of {count}.")
        return replace(stage, history=self._history(count))

    def _folder(self, number: int) -> Path:
        return self.home / f"stage-{number}"

    def _corrected(self, number: int) -> Path:
        return self._folder(number) / "corrected"

    def _done(self, count: int) -> int:
        """Return the last stage whose corrected weights are complete and were not damaged, 0 for
        none."""
        return max((i for i in range(1, count) if self._is_whole(i)), default=0)

    def _is_whole(self, number: int) -> bool:
        plans = (self._folder(i) / _PLAN for i in range(1, number + 1))
        return sealed(self._corrected(number)) and all(map(sealed, plans))

    def _keep_plan(self, number: int, plan: Plan) -> None:
        if world().first:
            self._folder(number).mkdir(exist_ok=True)
            plan.save(self._folder(number) / _PLAN)
            seal(self._folder(number) / _PLAN)
        world().wait()  # all read it in the end

    def _plan(self, number: int) -> Plan:
        return load_plan(self._folder(number) / _PLAN)

    def _next(self, number: int, sample: Sample) -> Stage:
        """Return a stage of what the one before it left: measured, and planned."""
        source = corrected(self.first.source, self._corrected(number - 1))
        settings = self.resolved.settings
        needs = decomposer_needs(settings.compress)
        if not self.fixed:
            needs |= plan_needs(settings)
        started = time.monotonic()
        calibration = calibrate_again(
            self.resolved,
            source,
            sample,
            self._folder(number) / "calibration",
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
        elif world().agreed(lambda: sealed(self._folder(number) / _PLAN)):
            return self._plan(number)
        else:
            ratio = [self.first.plan.ratio]
            plan = make_plans(self.resolved, source, calibration, self.reporter, ratio)[0]
        self._keep_plan(number, plan)
        return plan

    def _truncate(self, number: int, stage: Stage) -> None:
        folder = self._folder(number) / "checkpoint"
        if world().agreed(lambda: sealed(folder)):
            return
        made = factored(self.resolved, stage, folder, self.reporter)
        seal_folder(folder)
        self.seconds["decompose"] += made.decompose_seconds
        self.seconds["write"] += made.write_seconds

    def _correct(self, number: int, stage: Stage, sample: Sample) -> None:
        started = time.monotonic()
        checkpoint, folder = self._folder(number) / "checkpoint", self._corrected(number)
        correct(self.resolved, self.first, stage, checkpoint, folder, number, sample, self.reporter)
        self.seconds["calibrate"] += time.monotonic() - started

    def _tidy(self, number: int) -> None:
        """Remove what nothing needs once the weights of a stage are corrected."""
        for name in ("checkpoint", "calibration", "corrected.truncated"):
            shutil.rmtree(self._folder(number) / name, ignore_errors=True)
        if number > 1:
            shutil.rmtree(self._corrected(number - 1), ignore_errors=True)

    def _history(self, count: int) -> dict[str, Any]:
        """Return what the provenance says: the calibration of the original, and every stage."""
        made = self.first.calibration
        needs = decomposer_needs(self.resolved.settings.compress)
        plans = [self._plan(number) for number in range(1, count + 1)]
        return {
            "calibration": made.manifest,
            "gradients": made.gradients if set(needs) - {"moments"} else None,
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
