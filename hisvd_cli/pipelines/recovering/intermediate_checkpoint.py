"""The compressed checkpoint before recovery or rounding, kept for a run that resumes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, open_checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.recovering.recovery import prepare_recovery
from hisvd_cli.pipelines.recovering.training import run_recovery
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.files.checksums import seal, sealed
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions


@dataclass(frozen=True)
class Unmended:
    """The checkpoint that a compression leaves to what comes after it, recovery or rounding: a
    hidden folder, until the end."""

    folder: Path

    def keep(self) -> None:
        """Have a run that goes on here notice where the finished checkpoint was damaged."""
        if world().first:
            seal(self.folder)
        world().wait()

    def kept(self, plan: Plan, recorded: Mapping[str, Any], calibration: str) -> Compressed | None:
        """Return what an interrupted run left, where it was made by the same plan and settings from
        the calibration of that key and with the same libraries, and was not damaged since."""
        if not sealed(self.folder):
            return None
        record = open_checkpoint(self.folder).provenance
        made_with = (record.get("settings"), part(record, "calibration").get("key"))
        if (*made_with, record.get("versions")) != (recorded, calibration, versions()):
            return None
        if load_plan(self.folder / PLAN_FILE) != plan:
            return None
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return Compressed(self.folder, size, 0.0, 0.0, record)


def unmended(folder: Path) -> Unmended:
    """Return where the checkpoint ``folder`` is compressed to before its recovery."""
    return Unmended(folder.with_name(f".{folder.name}.unmended"))


def mend(resolved: Resolved, raw: Unmended, folder: Path, dense: Source, reporter: Reporter) -> int:
    """Train what was compressed, write it to ``folder``, and return its bytes.

    Raises:
        HisvdError: see :func:`prepare_recovery`.
    """
    made = run_recovery(prepare_recovery(resolved, raw.folder, reporter, dense), folder, reporter)
    shutil.rmtree(raw.folder)
    return made.bytes
