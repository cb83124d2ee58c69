"""The data of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.evaluation.grid import Evaluation, Grid
from hisvd_cli.evaluation.perplexity import PerplexityResult


@dataclass(frozen=True)
class Spectra:
    """Spectra of the linear layers of a model.

    Attributes:
        kind: whitened (squared singular values of W G^½) or weight (of W).
        energies: squared singular values by layer, in descending order.
    """

    kind: str
    energies: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model other than its results.

    Attributes:
        name: the name that the user gave.
        bytes: size of the weights.
        plan: the plan; None for a model that is not compressed or has none.
        record: the content of ``hisvd.json``; empty if there is none.
        seconds: durations by stage of the run that made it; None if not known on this machine.
    """

    name: str
    bytes: int
    plan: Plan | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] | None = None

    @property
    def series(self) -> str:
        """The series that the model belongs to in figures: the same methods at any ratio."""
        settings = self.record.get("settings", {})
        preset = settings.get("plan", {}).get("preset")
        if preset or self.plan is None:
            return str(preset or short_name(self.name))
        return f"{self.plan.allocator}, {self.record.get('decomposer', '')}".rstrip(", ")


@dataclass(frozen=True)
class Report:
    """Everything that a page shows.

    Attributes:
        grid: the results.
        models: facts by model, including the baseline.
        spectra: of the dense model, if available.
        settings: the settings of the evaluation, by section.
        versions: versions of the libraries used.
    """

    grid: Grid
    models: Mapping[str, ModelFacts]
    spectra: Spectra | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def planned(self) -> list[tuple[ModelFacts, Plan]]:
        """The models that have a plan, with their plans."""
        facts = [self.models[each.model] for each in self.grid.evaluations]
        return [(each, each.plan) for each in facts if each.plan is not None]

    @property
    def datasets(self) -> list[PerplexityResult]:
        """The first model's result on each text, which describes the text."""
        rows = self.grid.rows()
        return rows[0].results if rows else []

    def results(self, index: int) -> list[tuple[Evaluation, ModelFacts, PerplexityResult]]:
        """Return all models, the baseline first, with their results on text ``index``."""
        return [
            (each, self.models[each.model], each.results[index])
            for each in self.grid.rows()
            if index < len(each.results)
        ]


def short_name(model: str) -> str:
    """Return the last component of a model name."""
    return Path(model).name or model


def flat(document: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of JSON data with their paths, such as ``plan.ratio``."""
    if isinstance(document, Mapping) and document:
        return [leaf for k, v in document.items() for leaf in flat(v, f"{path}.{k}" if path else k)]
    if isinstance(document, list) and any(isinstance(item, Mapping) for item in document):
        return [leaf for i, v in enumerate(document) for leaf in flat(v, f"{path}.{i}")]
    return [(path, document)]


def as_text(value: Any) -> str:
    """Return a leaf of JSON data as text."""
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
