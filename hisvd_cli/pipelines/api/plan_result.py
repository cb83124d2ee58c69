"""The result of ``plan``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hisvd_cli.allocation.plan import Plan as PlanData
from hisvd_cli.inspection.stored_sublayers import Layout
from hisvd_cli.pipelines.api import display
from hisvd_cli.pipelines.api.arguments import Given, path_of
from hisvd_cli.pipelines.api.keywords import PathText
from hisvd_cli.pipelines.api.names import errors_in_python
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.planning.plan_files import check_plan_file
from hisvd_cli.pipelines.planning.tables import (
    BYTE_COLUMNS,
    CLUSTER_COLUMNS,
    active_text,
    byte_facts,
    byte_rows,
    cluster_rows,
    experts_text,
)
from hisvd_cli.utils.files.scratch import scratch_folder


@dataclass(frozen=True, repr=False)
class Plan(display.Result):
    """The rank of every layer.

    Attributes:
        data: the whole plan, as in ``plan.json``.
        given: settings of model, calibration and factorization.
    """

    data: PlanData
    given: Given = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model that it was made for, as given."""
        return str(self.data.provenance["model"]["name"])

    @property
    def ratio(self) -> float:
        """The requested keep ratio."""
        return self.data.ratio

    @property
    def ranks(self) -> dict[str, int]:
        """Name → rank of the low-rank layers."""
        return self.data.ranks

    def save(self, path: PathText) -> Path:
        """Write ``plan.json``; return its path.

        Raises:
            UsageError: the name does not end in ``.json``.
            OutputError: the path exists and is not a plan.
        """
        with errors_in_python():
            named = output_name(path_of(path), "path")
            check_plan_file(named, [self.ratio], [self.data.allocator], "path")
            self.data.save(named)
        return named

    def _facts(self) -> dict[str, object]:
        data = self.data
        found: dict[str, object] = {
            "model": self.model,
            "keep ratio": f"{data.ratio:g} ({data.allocator})",
            "kept": f"{data.kept_ratio:.2%} of the layers, {data.model_ratio:.2%} of the model",
            "low-rank layers": f"{len(data.ranks)} of {len(data.sublayers)}",
        }
        if text := experts_text(data):
            found["experts"] = text
        if data.active_parameters is not None:
            found["active per token"] = active_text(*data.active_parameters[::-1])
        if data.bytes is not None:
            del found["keep ratio"]
            ratio = {"bytes ratio": f"{data.bytes.ratio:g} ({data.allocator})"}
            found |= {**ratio, **byte_facts(data, data.bytes)}
            found |= quantized(Layout(bits=data.bits, group_size=data.bytes.group_size))
        return {**found, "predicted loss": f"{data.predicted_loss:.6g}"}

    def _tables(self) -> Sequence[str]:
        if self.data.bytes is not None:
            return [display.table(BYTE_COLUMNS, byte_rows(self.data, self.data.bytes))]
        return [display.table(CLUSTER_COLUMNS, cluster_rows(self.data))]


def quantized(layout: Layout) -> dict[str, str]:
    """Return the fact of the bits of quantized layers, if there are any."""
    return {"quantization": layout.line()} if layout.bits else {}


@contextmanager
def plan_file(plan: PlanData, scratch: str | None) -> Iterator[Path]:
    """Yield a temporary file with a plan."""
    with scratch_folder(scratch) as folder:
        file = folder / "plan.json"
        plan.save(file)
        yield file
