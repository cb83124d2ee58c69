"""One stage: truncates a model by its statistics and plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.factorize import Compressed, compress
from hisvd_cli.compression.updating import Update
from hisvd_cli.export.model_card import write_card
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.methods import decomposer_knobs, decomposer_needs
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.progress import Reporter

RECORDED = ("model", "calibration", "plan", "compress", "quantize")
"""Sections of the settings that decide the content of a checkpoint, except for fine-tuning."""


@dataclass(frozen=True)
class Stage:
    """The inputs of one truncation.

    Attributes:
        source: the model, with corrected weights from the second stage on.
        calibration: its statistics.
        plan: its ranks.
        history: provenance of the earlier stages, see :func:`compress`.
    """

    source: Source
    calibration: Calibration
    plan: Plan
    history: Mapping[str, Any] = field(default_factory=dict)

    @property
    def original_key(self) -> str:
        """Key of the original model's calibration, which the provenance names."""
        return str(self.history.get("calibration", self.calibration.manifest)["key"])


def factored(
    resolved: Resolved,
    stage: Stage,
    folder: Path,
    reporter: Reporter,
    update: Update | None = None,
) -> Compressed:
    """Truncate the model of a stage into a checkpoint folder, by the settings; only the last stage
    has an update."""
    knobs = resolved.settings.compress
    return compress(
        stage.source,
        stage.plan,
        stage.calibration,
        folder,
        decomposer=knobs.decomposer,
        knobs=decomposer_knobs(resolved.settings, stage.plan.settings),
        needs=decomposer_needs(knobs),
        device=exact_device(pick_device(resolved.settings.model.device)),
        shard_bytes=int(knobs.max_shard_size * 1e9),
        settings=resolved.recorded(*RECORDED),
        describe=lambda home, record: write_card(home, stage.source, stage.plan, record),
        reporter=reporter,
        history=stage.history,
        update=update,
    )
