"""A plan: which rank every sublayer gets, as data, with what led to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.allocation.byte_budget import BITS, FULL_BITS
from hisvd_cli.allocation.byte_frontier import Point
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from hisvd_cli.modeling.sublayers import Shape
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.json_files import json_text, read_json
from hisvd_cli.utils.files.text_output import write_through

FORMAT_VERSION = 1
_LATER = {"bytes"}  # what plans of earlier versions do not name


@dataclass(frozen=True)
class SublayerPlan:
    """One sublayer's row.

    ``rank`` is full where ``dense``; its numbers have ``bits``, 16 standing for those that stay as
    the model has them, and take ``bytes`` on disk (None where the plan counts parameters). ``loss``
    is Σ_{j>rank} σ_j², and what rounding adds.
    """

    name: str
    layer: int
    cluster: str
    shape: Shape
    density: float | None
    baseline_rank: int
    rank: int
    full_rank: int
    dense: bool
    parameters: int
    loss: float
    bits: int = 16
    bytes: int | None = None


@dataclass(frozen=True)
class BytePlan:
    """What a plan by bytes counts, scales included.

    Attributes:
        ratio: the bytes ratio asked for.
        budget: bytes that the sublayers may take.
        kept: bytes that they take.
        full: bytes that they take in the model.
        model: bytes that the whole model takes.
        method: how numbers are rounded: nearest or gptq.
        group_size: numbers that share a scale, with 4 bits.
        frontier: what this choice and others would lose at this and other ratios.
    """

    ratio: float
    budget: int
    kept: int
    full: int
    model: int
    method: Literal["nearest", "gptq"]
    group_size: int
    frontier: list[Point]

    @property
    def kept_ratio(self) -> float:
        """Share of the planned sublayers' bytes that is kept."""
        return self.kept / self.full

    @property
    def model_ratio(self) -> float:
        """Share of the whole model's bytes that is kept."""
        return (self.model - self.full + self.kept) / self.model


@dataclass(frozen=True)
class ClusterPlan:
    """One sublayer type: how many, mean density, tail share T_c, stage-2 factor, share kept."""

    cluster: str
    sublayers: int
    density: float | None
    tail_share: float
    factor: float | None
    kept_ratio: float


@dataclass(frozen=True)
class Plan:
    """Ranks for a model at one ratio.

    Attributes:
        ratio: the keep ratio asked for; of a plan by bytes, the one that came of it.
        model_ratio: parameters kept of the whole model, embeddings and all.
        allocator: name of the method.
        settings: the plan's resolved settings; plans from before there was a choice of ``storage``
            do not name it.
        budget_parameters: what the sublayers may keep.
        kept_parameters: what they keep.
        predicted_loss: Σ of the sublayers' losses.
        clusters: a row per sublayer type.
        sublayers: a row per sublayer.
        provenance: model, calibration (None: from weights alone) and versions.
        bytes: what a plan by bytes counts; None for one by parameters.
    """

    ratio: float
    model_ratio: float
    allocator: str
    settings: dict[str, Any]
    budget_parameters: int
    kept_parameters: int
    predicted_loss: float
    clusters: list[ClusterPlan]
    sublayers: list[SublayerPlan]
    provenance: dict[str, Any]
    bytes: BytePlan | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Name → rank, truncated sublayers only."""
        return {s.name: s.rank for s in self.sublayers if not s.dense}

    @property
    def bits(self) -> dict[str, int]:
        """Name → bits, rounded sublayers only."""
        return {s.name: s.bits for s in self.sublayers if s.bits < FULL_BITS}

    @property
    def storage(self) -> Storage:
        """How its pairs are written."""
        storage: Storage = self.settings.get("storage", "pair")
        return storage

    @property
    def full_parameters(self) -> int:
        """Parameters of the planned sublayers before compression."""
        return sum(s.shape[0] * s.shape[1] for s in self.sublayers)

    @property
    def model_parameters(self) -> int | None:
        """Parameters of the whole model before compression, where the plan records them."""
        total: int | None = self.provenance["model"].get("parameters")
        return total

    @property
    def kept_ratio(self) -> float:
        """Share of the planned sublayers' parameters that is kept."""
        return self.kept_parameters / self.full_parameters

    @property
    def calibrated(self) -> bool:
        """Whether the plan knows activations, or weights alone."""
        return self.provenance["calibration"] is not None

    def summary(self) -> dict[str, Any]:
        """Return the totals that a checkpoint's provenance repeats."""
        names = ("ratio", "model_ratio", "allocator", "budget_parameters", "kept_parameters")
        return {name: getattr(self, name) for name in names}

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {"kind": "plan", "format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write ``plan.json``. Raises OutputError."""
        write_through(path, json_text(self.document()))


def load_plan(path: Path) -> Plan:
    """Read a plan back. Raises SourceError for a file that is no plan."""
    try:
        document = read_json(path)
        if document["kind"] != "plan" or document["format_version"] != FORMAT_VERSION:
            raise ValueError(document["kind"])
        return plan_from(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is not a plan of this version of hisvd.",
            "Make one with: hisvd plan --output plan.json",
        ) from error


def plan_from(document: Mapping[str, Any]) -> Plan:
    """Build a Plan from its JSON data.

    Raises:
        ValueError: a value of a wrong type, a rank that no matrix of that shape has.
        KeyError: a key is missing.
    """
    fields = Plan.__dataclass_fields__
    known = {n: document[n] for n in fields if n in document or n not in _LATER}
    # As JSON, where a list may stand for a tuple: strictly, so that no true or "3" counts as 3.
    plan = TypeAdapter(Plan).validate_json(json.dumps(known, allow_nan=False), strict=True)
    if plan.storage not in LAYERS:
        raise ValueError(f"storage {plan.storage}")
    if not plan.sublayers:
        raise ValueError("no sublayers")
    for row in plan.sublayers:
        _check_row(row)
    if plan.bytes is not None and min(plan.bytes.full, plan.bytes.model, plan.bytes.group_size) < 1:
        raise ValueError("bytes")
    _check_origin(plan.provenance)
    return plan


def _check_row(row: SublayerPlan) -> None:
    if not 1 <= row.rank <= full_rank(row.shape) or row.layer < 0 or row.parameters < 1:
        raise ValueError(f"{row.name}: rank {row.rank}")
    if row.bits not in BITS:
        raise ValueError(f"{row.name}: {row.bits} bits")


def _check_origin(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError where a plan does not say what it was made for."""
    model, calibration = provenance["model"], provenance["calibration"]
    if not isinstance(model["name"], str) or not isinstance(model["fingerprint"], str):
        raise ValueError("provenance")
    if type(model.get("parameters", 1)) is not int or model.get("parameters", 1) < 1:
        raise ValueError("provenance")
    if calibration is not None and not isinstance(calibration, str):
        raise ValueError("provenance")
