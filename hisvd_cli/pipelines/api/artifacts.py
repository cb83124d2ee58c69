"""Results of ``calibrate``, ``compress`` and ``convert``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from hisvd_cli.allocation.plan import Plan as PlanData
from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.calibration.store import Calibration as CalibrationData
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.report_tables import figure_text
from hisvd_cli.inspection.stored_sublayers import Layout
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, is_checkpoint, open_checkpoint
from hisvd_cli.pipelines.api import display
from hisvd_cli.pipelines.api.arguments import Given
from hisvd_cli.pipelines.api.keywords import LoadKeywords, PathText
from hisvd_cli.pipelines.api.loading import load
from hisvd_cli.pipelines.api.plan_result import Plan, quantized
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.conversion import bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, repr=False)
class Calibration(display.Result):
    """Activation statistics of a model, on disk.

    Attributes:
        model: the model, as given.
        data: the calibration on disk: ``folder``, ``manifest``, ``holds``.
        seconds: time of the calibration, near 0 if it existed already.
        given: settings of model and text.
    """

    model: str
    data: CalibrationData
    seconds: float
    given: Given = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the statistics."""
        return self.data.folder

    def __fspath__(self) -> str:
        return str(self.folder)

    def _facts(self) -> dict[str, object]:
        text = self.data.manifest["data"]
        return {
            "model": self.model,
            "text": f"{text['dataset']} ({text['split']})",
            "tokens": f"{text['samples']} × {text['seqlen']} = {text['tokens']:,}",
            "precision": self.data.manifest["dtype"],
            "holds": ", ".join(sorted(self.data.holds)),
            "folder": self.folder,
        }


@dataclass(frozen=True, repr=False)
class Checkpoint(display.Result):
    """A compressed model on disk: a folder, or a single ``.pt`` file.

    Attributes:
        path: the folder or file.
        outcome: sizes, times and perplexities of ``compress``; None if it was not made by that.
        url: address of its upload.
    """

    path: Path
    outcome: Outcome | None = None
    url: str | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def plan(self) -> PlanData | None:
        """Its plan; None if there is none with its weights."""
        if self.outcome is not None:
            return self.outcome.plan
        file = self.path / PLAN_FILE
        return load_plan(file) if file.is_file() else None

    @property
    def perplexity(self) -> tuple[PerplexityResult, PerplexityResult] | None:
        """Perplexity before and after compression, if ``compress`` measured it."""
        return self.outcome.perplexity if self.outcome else None

    def load(self, **settings: Unpack[LoadKeywords]) -> PreTrainedModel:
        """Load the model; see :func:`hisvd_cli.load`."""
        return load(self, **settings)

    def _facts(self) -> dict[str, object]:
        found: dict[str, object] = {"path": self.path}
        if (plan := self.plan) is not None:
            found["model"] = plan.provenance["model"]["name"]
            found["kept"] = f"{plan.kept_ratio:.2%} of the layers, {plan.model_ratio:.2%} of all"
        if self.outcome is not None:
            found["size"] = f"{self.outcome.bytes:,} bytes, before {self.outcome.dense_bytes:,}"
        elif self.path.exists():
            found["size"] = f"{bytes_of(self.path):,} bytes"
        if is_checkpoint(self.path):
            made = open_checkpoint(self.path)
            found |= quantized(Layout(bits=made.bits, group_size=made.group_size))
        if self.perplexity is not None:
            before, after = (figure_text(each, "perplexity", "{:.2f}") for each in self.perplexity)
            found["perplexity"] = f"{after}, before {before}"
        return {**found, "uploaded to": self.url} if self.url else found


def given_with(source: Plan | Calibration | Checkpoint | PathText) -> Given:
    """Return the settings that the argument of a function was made with."""
    if isinstance(source, Calibration):
        return {**source.given, ("calibration", "path"): str(source.folder)}
    if isinstance(source, Plan):
        return source.given
    return {} if isinstance(source, Checkpoint) else {("model", "name"): os.fspath(source)}
