"""The folders in which the results of stages are kept until the checkpoint is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.pipelines.compressing.stages.stage import Stage
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.sealing import seal_together, sealed_together
from hisvd_cli.utils.distributed import building_together, world
from hisvd_cli.utils.files.checksums import sealed
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.scratch import work_folder

_PLAN = "plan.json"


@dataclass(frozen=True)
class StageFolders:
    """The folders ``stage-i`` of stages 1, 2, …: each with the plan of the stage, its calibration
    (except for the first), its checkpoint, and finally its corrected weights.

    Attributes:
        home: the folder that contains them.
    """

    home: Path

    def folder(self, number: int) -> Path:
        """Return the folder of a stage."""
        return self.home / f"stage-{number}"

    def corrected(self, number: int) -> Path:
        """Return the folder of the corrected weights of a stage."""
        return self.folder(number) / "corrected"

    def checkpoint(self, number: int) -> Path:
        """Return the folder of the checkpoint of a stage."""
        return self.folder(number) / "checkpoint"

    def calibration(self, number: int) -> Path:
        """Return the folder of the calibration of a stage."""
        return self.folder(number) / "calibration"

    def finished(self, count: int) -> int:
        """Return the last of ``count`` stages whose corrected weights are complete and undamaged, 0
        for none."""
        return max((i for i in range(1, count) if self._is_complete(i)), default=0)

    def _is_complete(self, number: int) -> bool:
        plans = (self.folder(i) / _PLAN for i in range(1, number + 1))
        return sealed(self.corrected(number)) and all(map(sealed, plans))

    def keep_plan(self, number: int, plan: Plan) -> None:
        """Write and seal the plan of a stage."""
        if world().first:
            self.folder(number).mkdir(exist_ok=True)
            plan.save(self.folder(number) / _PLAN)
        seal_together(self.folder(number) / _PLAN)

    def has_plan(self, number: int) -> bool:
        """Return whether an undamaged plan of a stage exists."""
        return sealed_together(self.folder(number) / _PLAN)

    def plan(self, number: int) -> Plan:
        """Return the plan of a stage."""
        return load_plan(self.folder(number) / _PLAN)

    def tidy(self, number: int) -> None:
        """Remove what is not needed once the weights of a stage are corrected."""
        for name in ("checkpoint", "calibration", "corrected.truncated"):
            shutil.rmtree(self.folder(number) / name, ignore_errors=True)
        if number > 1:
            shutil.rmtree(self.corrected(number - 1), ignore_errors=True)


@contextmanager
def stage_folders(resolved: Resolved, first: Stage, output: Path) -> Iterator[StageFolders]:
    """Yield the folders of stages in the work folder of ``output``; they are removed once the body
    has succeeded. Results of an interrupted run with the same settings are kept."""
    described = json.dumps([resolved.recorded(), first.plan.document()], sort_keys=True)
    made_from = first.calibration
    key = digest(described, first.source.fingerprint, made_from.key, made_from.gradients_key)
    folder = work_folder(output) / "stages"
    with building_together(folder, key) as home:
        yield StageFolders(home)
    if world().first:
        shutil.rmtree(folder)
