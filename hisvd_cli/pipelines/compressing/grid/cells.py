"""The checkpoints of a grid of presets and ratios."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.evaluation.grid import Failure
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.output_names import check_form
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.utils.errors import OutputError, UsageError
from hisvd_cli.utils.files.fingerprints import ratio_name, slug


@dataclass(frozen=True)
class Cell:
    """One checkpoint of a grid.

    Attributes:
        resolved: its settings, of one ratio and at most one preset.
        output: its folder.
        outcome: the result of the compression; None if the checkpoint existed already, or failed.
        failure: the error if it failed.
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
        """Return ``made``, ``kept`` (it existed already), or ``failed``."""
        return "failed" if self.failure else "made" if self.outcome else "kept"

    @property
    def bytes(self) -> int:
        """Bytes of its weights, 0 if it failed."""
        return sum(path.stat().st_size for path in self.output.glob("*.safetensors"))

    def plan(self) -> Plan | None:
        """Return its plan; None if it failed."""
        return None if self.failure else load_plan(self.output / PLAN_FILE)

    def document(self) -> dict[str, Any]:
        """Return the cell as JSON data: the document of a compression, with its status."""
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
    """Return whether the settings request several checkpoints; a bytes ratio gives one.

    Raises:
        UsageError: see :func:`hisvd_cli.pipelines.planning.byte_budgets.bytes_ratio`.
    """
    return bytes_ratio(resolved) is None and len(resolved.cells()) > 1


def grid_cells(resolved: Resolved, output: Path | None) -> list[Cell]:
    """Return the cells of a grid, as MODEL-PRESET-RATIO in ``output`` or the current folder.

    Raises:
        UsageError: ``output`` is the name of a single file.
        OutputError: ``output`` is a file.
    """
    if output is not None and output.suffix == ".pt":
        raise UsageError(
            f"`output={output}` is a single file, but several checkpoints were requested.",
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
