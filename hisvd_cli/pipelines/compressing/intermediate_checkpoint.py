"""Checkpoints between the steps of a compression, kept for a run that resumes."""

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
from hisvd_cli.pipelines.sealing import seal_together
from hisvd_cli.utils.files.checksums import sealed
from hisvd_cli.utils.versions import versions


@dataclass(frozen=True)
class IntermediateCheckpoint:
    """A checkpoint folder that a later step, fine-tuning or quantization, reads."""

    folder: Path

    def keep(self) -> None:
        """Seal the finished checkpoint, so that a resumed run detects damage."""
        seal_together(self.folder)

    def kept(self, plan: Plan, recorded: Mapping[str, Any], calibration: str) -> Compressed | None:
        """Return the checkpoint that an interrupted run left; None if there is none, it is damaged,
        or plan, settings, calibration (its key) or library versions differ."""
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

    def remove(self) -> None:
        """Remove the checkpoint, once the next step is complete."""
        shutil.rmtree(self.folder)
