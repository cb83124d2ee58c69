"""What the functions of the Python API return: data with a readable form in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from hisvd_cli.allocation.plan import Plan as PlanData
from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.calibration.store import Calibration as CalibrationData
from hisvd_cli.evaluation.grid import Evaluation as Evaluated
from hisvd_cli.evaluation.grid import Failure, Grid
from hisvd_cli.evaluation.perplexity import PerplexityResult
from hisvd_cli.evaluation.report_tables import FIGURES, figure_text
from hisvd_cli.inspection.audit import Audit as AuditData
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.pipelines.api import html
from hisvd_cli.pipelines.api.arguments import Given, path_of
from hisvd_cli.pipelines.api.keywords import LoadKeywords, PathText
from hisvd_cli.pipelines.api.loading import load
from hisvd_cli.pipelines.api.names import errors_in_python
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.planning.plan_files import check_plan_file
from hisvd_cli.pipelines.planning.tables import CLUSTER_COLUMNS, cluster_rows
from hisvd_cli.utils.escaping import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_PROBLEMS = 20


class Result(ABC):
    """Something with facts: a line of them as text, a table of them in a notebook."""

    @abstractmethod
    def _facts(self) -> dict[str, object]:
        """Return what there is to say of it, by name."""

    def _tables(self) -> Sequence[str]:
        """Return more tables for a notebook, as HTML."""
        return ()

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"<{type(self).__name__} {' '.join(printable(facts).split())}>"

    def _repr_html_(self) -> str:
        return "".join([html.facts(type(self).__name__, self._facts()), *self._tables()])


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """Activation statistics of a model, on disk.

    Attributes:
        model: the model, as it was named.
        data: what is on disk: ``folder``, ``manifest``, ``holds``.
        seconds: what taking them took, near 0 where they were there already.
        given: settings of the model and the text that they were taken with.
    """

    model: str
    data: CalibrationData
    seconds: float
    given: Given = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the statistics are."""
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
class Plan(Result):
    """The rank of every layer.

    Attributes:
        data: the whole plan, as ``plan.json`` holds it.
        given: settings of the model, the calibration and the factorisation that it was made with.
    """

    data: PlanData
    given: Given = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model that it was made for, as it was named."""
        return str(self.data.provenance["model"]["name"])

    @property
    def ratio(self) -> float:
        """Keep ratio that was asked for."""
        return self.data.ratio

    @property
    def ranks(self) -> dict[str, int]:
        """Name → rank of the layers that become low-rank."""
        return self.data.ranks

    def save(self, path: PathText) -> Path:
        """Write ``plan.json``; return its path.

        Raises:
            UsageError: the name does not end in ``.json``.
            OutputError: something else than a plan is there.
        """
        with errors_in_python():
            named = output_name(path_of(path))
            check_plan_file(named, [self.ratio], [self.data.allocator])
            self.data.save(named)
        return named

    def _facts(self) -> dict[str, object]:
        data = self.data
        return {
            "model": self.model,
            "keep ratio": f"{data.ratio:g} ({data.allocator})",
            "kept": f"{data.kept_ratio:.2%} of the layers, {data.model_ratio:.2%} of the model",
            "low-rank layers": f"{len(data.ranks)} of {len(data.sublayers)}",
            "predicted loss": f"{data.predicted_loss:.6g}",
        }

    def _tables(self) -> Sequence[str]:
        return [html.table(CLUSTER_COLUMNS, cluster_rows(self.data))]


@dataclass(frozen=True, repr=False)
class Checkpoint(Result):
    """A compressed model on disk: a folder, or one ``.pt`` file.

    Attributes:
        path: where it is.
        outcome: what making it took and gave; None where it was not made by ``compress``.
        url: where it was uploaded to.
    """

    path: Path
    outcome: Outcome | None = None
    url: str | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def plan(self) -> PlanData | None:
        """Its plan; None where there is none beside its weights."""
        if self.outcome is not None:
            return self.outcome.plan
        file = self.path / PLAN_FILE
        return load_plan(file) if file.is_file() else None

    @property
    def perplexity(self) -> tuple[PerplexityResult, PerplexityResult] | None:
        """Perplexity before and after, where ``compress`` measured it."""
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
        if self.perplexity is not None:
            before, after = (figure_text(each, "perplexity", "{:.2f}") for each in self.perplexity)
            found["perplexity"] = f"{after}, before {before}"
        return {**found, "uploaded to": self.url} if self.url else found


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What was measured of models.

    Attributes:
        grid: all figures, with intervals and comparisons.
    """

    grid: Grid

    @property
    def perplexity(self) -> dict[str, float | None]:
        """Model → perplexity on the first text; None where it is not finite."""
        return {each.model: each.results[0].perplexity for each in self.grid.evaluations}

    @property
    def baseline(self) -> Evaluated | None:
        """What the models were compared with."""
        return self.grid.baseline

    @property
    def failures(self) -> list[Failure]:
        """Models that could not be evaluated, and why."""
        return self.grid.failures

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return self.grid.document()

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for model in self.grid.rows():
            for found in model.results:
                cells = (figure_text(found, name, form) for name, (_, form) in FIGURES.items())
                yield (model.model, f"{found.dataset} ({found.split})", *cells)

    def _facts(self) -> dict[str, object]:
        found: dict[str, object] = {
            f"{model}, {text}": f"perplexity {perplexity}"
            for model, text, perplexity, *_ in self._rows()
        }
        return found | {f"{each.model} failed": each.message for each in self.failures}

    def _tables(self) -> Sequence[str]:
        columns = ("model", "text", *(title for title, _ in FIGURES.values()))
        scores = [
            (model.model, each.task, each.metric, each.value)
            for model in self.grid.rows()
            for each in model.scores or ()
        ]
        tasks = [html.table(("model", "task", "metric", "value"), scores)] if scores else []
        return [html.table(columns, self._rows()), *tasks]


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """What ``inspect`` found.

    Attributes:
        data: all of it.
    """

    data: AuditData

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        return self.data.problems

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return self.data.document()

    def _facts(self) -> dict[str, object]:
        data = self.data
        found: dict[str, object] = {"what": data.kind, "target": data.target, **data.table}
        if data.model_ratio is not None:
            found["kept"] = f"{data.model_ratio:.2%} of the model"
        return {**found, "size": f"{data.bytes:,} bytes", "problems": len(data.problems)}

    def _tables(self) -> Sequence[str]:
        if not self.problems:
            return ()
        return [html.table(["problem"], ([line] for line in self.problems[:_MAX_PROBLEMS]))]
