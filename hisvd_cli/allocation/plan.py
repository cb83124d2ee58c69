"""A plan: the rank of every sublayer, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.allocation.byte_budget import BITS, FULL_BITS, bits_of
from hisvd_cli.allocation.plans.consistency import InconsistentPlanError, check_consistency
from hisvd_cli.allocation.plans.rows import BytePlan, ClusterPlan, SublayerPlan
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from hisvd_cli.modeling.layers.shapes import active_parameters, copies, is_stack, numel
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.json_files import json_text, read_json
from hisvd_cli.utils.files.text_output import write_through

FORMAT_VERSION = 1
_LATER = {"bytes"}  # fields that plans of earlier versions do not have


@dataclass(frozen=True)
class Plan:
    """Ranks for a model at one ratio.

    Attributes:
        ratio: the requested keep ratio; for a plan by bytes, the resulting one.
        model_ratio: kept share of the parameters of the whole model, including embeddings.
        allocator: name of the method.
        settings: the resolved settings; plans of earlier versions have no ``storage``.
        budget_parameters: maximum parameters of the sublayers.
        kept_parameters: parameters of the sublayers after compression.
        predicted_loss: sum of the losses of the sublayers.
        clusters: one entry per sublayer type.
        sublayers: one entry per sublayer.
        provenance: model, calibration (None if made from weights alone) and versions. The model of
            one with experts has ``active_parameters`` and ``experts_per_token``, if they are known.
        bytes: byte counts of a plan by bytes; None for a plan by parameters.
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
        """Name → rank of truncated sublayers."""
        return {s.name: s.rank for s in self.sublayers if not s.dense}

    @property
    def bits(self) -> dict[str, int]:
        """Name → bits of rounded sublayers."""
        return {s.name: s.bits for s in self.sublayers if s.bits < FULL_BITS}

    @property
    def storage(self) -> Storage:
        """Storage of the pairs."""
        storage: Storage = self.settings.get("storage", "pair")
        return storage

    @property
    def full_parameters(self) -> int:
        """Parameters of the planned sublayers before compression."""
        return sum(numel(s.shape) for s in self.sublayers)

    @property
    def model_parameters(self) -> int | None:
        """Parameters of the whole model before compression, if the plan records them."""
        total: int | None = self.provenance["model"].get("parameters")
        return total

    @property
    def active_parameters(self) -> tuple[int, int] | None:
        """Parameters of the whole model that one token uses, before and after compression; None
        without experts, or if the plan does not record them."""
        model = self.provenance["model"]
        before, count = model.get("active_parameters"), model.get("experts_per_token")
        saved = [(s.shape, numel(s.shape) - s.parameters) for s in self.sublayers]
        stacks = [(shape, each) for shape, each in saved if is_stack(shape)]
        less = active_parameters(sum(each for _, each in saved), stacks, count)
        return None if before is None or less is None else (before, before - less)

    @property
    def kept_ratio(self) -> float:
        """Kept share of the parameters of the planned sublayers."""
        return self.kept_parameters / self.full_parameters

    @property
    def calibrated(self) -> bool:
        """Whether the plan uses activation statistics."""
        return self.provenance["calibration"] is not None

    def summary(self) -> dict[str, Any]:
        """Return the totals that the provenance of a checkpoint repeats."""
        names = ("ratio", "model_ratio", "allocator", "budget_parameters", "kept_parameters")
        return {name: getattr(self, name) for name in names}

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {"kind": "plan", "format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write ``plan.json``. Raises OutputError."""
        write_through(path, json_text(self.document()))


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        SourceError: there is no such file, it is not a plan, or values in it disagree.
    """
    try:
        document = read_json(path)
        if document["kind"] != "plan" or document["format_version"] != FORMAT_VERSION:
            raise ValueError(document["kind"])
        return plan_from(document)
    except FileNotFoundError as error:
        raise SourceError(f"There is no file '{path}'.", "Check the path.") from error
    except InconsistentPlanError as error:
        raise SourceError(
            f"The values in {path} disagree: {error}",
            "Correct these values, or make the plan again with: hisvd plan --output plan.json",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is not a plan that this version of hisvd can read.",
            "Make one with: hisvd plan --output plan.json",
        ) from error


def plan_from(document: Mapping[str, Any]) -> Plan:
    """Return the plan of a JSON document.

    Raises:
        ValueError: a value has a wrong type, or a rank does not fit its shape.
        InconsistentPlanError: values disagree with each other.
        KeyError: a key is missing.
    """
    fields = Plan.__dataclass_fields__
    known = {n: document[n] for n in fields if n in document or n not in _LATER}
    # Strict, so that true or "3" is not read as 3; as JSON, so that lists are read as tuples.
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
    check_consistency(
        plan.sublayers,
        plan.clusters,
        plan.storage,
        kept_parameters=plan.kept_parameters,
        model_ratio=plan.model_ratio,
        model_parameters=plan.model_parameters,
        kept_bytes=plan.bytes.kept if plan.bytes else None,
    )
    return plan


def _check_row(row: SublayerPlan) -> None:
    if not 1 <= row.rank <= full_rank(row.shape) or row.layer < 0 or row.parameters < 1:
        raise ValueError(f"{row.name}: rank {row.rank}")
    if copies(row.shape) < 1:
        raise ValueError(f"{row.name}: no experts")
    if row.bits not in BITS or bits_of(row.shape, row.bits) != row.bits:
        raise ValueError(f"{row.name}: {row.bits} bits")


def _check_origin(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError if the provenance of a plan is invalid."""
    model, calibration = provenance["model"], provenance["calibration"]
    if not isinstance(model["name"], str) or not isinstance(model["fingerprint"], str):
        raise ValueError("provenance")
    for key in ("parameters", "active_parameters", "experts_per_token"):
        if type(model.get(key, 1)) is not int or model.get(key, 1) < 1:
            raise ValueError(f"provenance: {key}")
    if calibration is not None and not isinstance(calibration, str):
        raise ValueError("provenance")
