"""What a report tells, as plain data: models with what is known of each, and their results."""

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
    """Energies of a model's sublayers, largest first.

    Attributes:
        kind: whitened (squared singular values of W G^½), or weight (of W).
        energies: sublayer → energies.
    """

    kind: str
    energies: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of one model beside its results.

    Attributes:
        name: as the user named it.
        bytes: of its weights.
        plan: its ranks; None where it is not compressed, or has no plan.
        record: its ``hisvd.json``, empty where there is none.
        seconds: by stage, of the run that made it; None where this machine knows of none.
    """

    name: str
    bytes: int
    plan: Plan | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] | None = None

    @property
    def series(self) -> str:
        """What a line of the figures connects: the same methods at several ratios."""
        settings = self.record.get("settings", {})
        preset = settings.get("plan", {}).get("preset")
        if preset or self.plan is None:
            return str(preset or short_name(self.name))
        return f"{self.plan.allocator}, {self.record.get('decomposer', '')}".rstrip(", ")


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        grid: the results.
        models: model → what is known of it; of the baseline too.
        spectra: of the dense model, where they were found.
        settings: of the evaluation, section by section.
        versions: of the programs of this run.
    """

    grid: Grid
    models: Mapping[str, ModelFacts]
    spectra: Spectra | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def planned(self) -> list[tuple[ModelFacts, Plan]]:
        """Models with a plan, and their plans."""
        facts = [self.models[each.model] for each in self.grid.evaluations]
        return [(each, each.plan) for each in facts if each.plan is not None]

    @property
    def datasets(self) -> list[PerplexityResult]:
        """The first model's result on each text, which says what text that is."""
        rows = self.grid.rows()
        return rows[0].results if rows else []

    def results(self, index: int) -> list[tuple[Evaluation, ModelFacts, PerplexityResult]]:
        """Return every model, the baseline first, with its result on text ``index``."""
        return [
            (each, self.models[each.model], each.results[index])
            for each in self.grid.rows()
            if index < len(each.results)
        ]


def short_name(model: str) -> str:
    """Return the last part of a model's name."""
    return Path(model).name or model


def flat(document: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of JSON data, each behind its path: ``plan.ratio``."""
    if isinstance(document, Mapping) and document:
        return [leaf for k, v in document.items() for leaf in flat(v, f"{path}.{k}" if path else k)]
    if isinstance(document, list) and any(isinstance(item, Mapping) for item in document):
        return [leaf for i, v in enumerate(document) for leaf in flat(v, f"{path}.{i}")]
    return [(path, document)]


def as_text(value: Any) -> str:
    """Return a leaf of JSON data as a reader would write it."""
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
