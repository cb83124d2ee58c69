"""The result of an inspection: layers, totals and problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.inspection.stored_sublayers import Row
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE
from hisvd_cli.modeling.checkpoints.record_schema import record_problem
from hisvd_cli.modeling.layers.lowrank import is_order
from hisvd_cli.modeling.layers.quantized import MATRICES, SCALE
from hisvd_cli.modeling.layers.shapes import numel
from hisvd_cli.utils.errors import SourceError


def part(document: object, name: str) -> dict[str, Any]:
    """Return the object ``name`` of a JSON document; empty if there is none."""
    inner = document.get(name) if isinstance(document, dict) else None
    return inner if isinstance(inner, dict) else {}


@dataclass(frozen=True)
class Audit:
    """The result of an inspection.

    Attributes:
        kind: checkpoint, pt, plan, calibration or model.
        target: what was inspected, as given by the user.
        parameters: number of parameters on disk; None if unknown.
        dense_parameters: those of the original model; None if unknown.
        bytes: size of the weights on disk.
        dense_bytes: size of the original model in the dtype of the unquantized weights; None if
            unknown.
        active: parameters that one token uses, in this and in the original model; None without
            experts, or if unknown.
        sublayers: one row per sublayer.
        provenance: how it was made, as recorded in the files.
        problems: one line per problem.
        table: name → value, for display.
    """

    kind: str
    target: str
    parameters: int | None
    dense_parameters: int | None
    bytes: int
    sublayers: list[Row]
    provenance: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    table: dict[str, str] = field(default_factory=dict)
    dense_bytes: int | None = None
    active: tuple[int, int] | None = None

    @property
    def bytes_ratio(self) -> float | None:
        """Size on disk relative to the original model."""
        return self.bytes / self.dense_bytes if self.dense_bytes else None

    @property
    def ratio(self) -> float | None:
        """Keep ratio of the sublayers; None without sublayers."""
        full = sum(numel(row.shape) for row in self.sublayers)
        return sum(row.parameters for row in self.sublayers) / full if full else None

    @property
    def model_ratio(self) -> float | None:
        """Keep ratio of the whole model; None if unknown."""
        if not self.parameters or not self.dense_parameters:
            return None
        return self.parameters / self.dense_parameters

    def document(self) -> dict[str, Any]:
        """Return the audit as JSON data."""
        return {
            "kind": self.kind,
            "ratio": self.ratio,
            "model_ratio": self.model_ratio,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            **self._active(),
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "bytes_ratio": self.bytes_ratio,
            "sublayers": [asdict(row) for row in self.sublayers],
            "provenance": self.provenance,
            "problems": self.problems,
        }

    def _active(self) -> dict[str, int]:
        if self.active is None:
            return {}
        used, dense = self.active
        return {"active_parameters": used, "dense_active_parameters": dense}

    def line(self) -> str:
        """Return the result in one line."""
        count = len(self.problems)
        return f"{self.kind}: {count or 'no'} problem{'s' * (count != 1)}"


def parameters_on_disk(
    matrices: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> int:
    """Return the number of parameters on disk; of quantized layers, codes count, scales do not.

    Args:
        matrices: name → shape of the (unpacked) matrices.
        found: name → shape on disk.
    """
    return sum(
        prod(matrices.get(name, shape)) for name, shape in found.items() if not _is_scale(name)
    )


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Compare the shapes of tensors on disk with those that the config requires."""
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name}: missing.")
        elif found[name] != shape:
            problems.append(
                f"{name}: {list(found[name])} on disk, {list(shape)} expected by config.json."
            )
    return problems


def value_problems(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Find NaN or infinite values, and row orders that are not permutations."""
    problems = []
    for name, tensor in tensors:
        numbers = tensor.view(torch.float16) if _is_scale(name) else tensor
        if not bool(numbers.isfinite().all()):
            problems.append(f"{name}: contains NaN or infinite values.")
        elif name.endswith(".weight_order") and not is_order(tensor):
            problems.append(f"{name}: not a permutation of rows.")
    return problems


def plan_file_problems(path: Path, rows: Iterable[Row]) -> list[str]:
    """Compare the ranks on disk with those of a plan file, which may itself be damaged."""
    try:
        return plan_problems(load_plan(path), rows)
    except SourceError as error:
        return [error.message]


def _is_scale(name: str) -> bool:
    """Return whether a tensor holds the scales of a quantized one, float16 stored as integers."""
    return name.rpartition(".")[2] in {leaf + SCALE for leaf in MATRICES}


def plan_problems(plan: Plan, rows: Iterable[Row]) -> list[str]:
    """Compare the ranks on disk with those of the plan."""
    found = {row.name: row for row in rows}
    problems = []
    for planned in plan.sublayers:
        row = found.get(planned.name)
        # With 4 bits, pivoted factors are stored as plain ones, which have more parameters.
        parameters = planned.parameters if row is None or row.bits == 4 else row.parameters
        if row is None or (row.rank, parameters) != (planned.rank, planned.parameters):
            have = "missing" if row is None else f"rank {row.rank}"
            problems.append(f"{planned.name}: {have}, but the plan has rank {planned.rank}.")
    return problems


def provenance_problems(made: Mapping[str, Any]) -> list[str]:
    """Find what is wrong with the record of how a checkpoint was made."""
    if not made:
        return [f"{PROVENANCE} is missing or empty: the provenance is unknown."]
    if problem := record_problem(made):
        return [f"{PROVENANCE} is damaged: {problem}."]
    if not part(made, "model"):
        return [f"{PROVENANCE} has no entry 'model': the provenance is unknown."]
    return []


def recovery_text(made: Mapping[str, Any]) -> str:
    """Describe the fine-tuning recorded in a provenance in one line; empty without one."""
    trained = part(made, "recovery")
    if not trained:
        return ""
    dataset = Path(str(part(trained, "data").get("dataset"))).name
    return f"{trained.get('method')}, {int(trained.get('tokens') or 0):,} tokens of {dataset}"


def provenance_table(made: dict[str, Any]) -> dict[str, str]:
    """Return the display rows about how a checkpoint was made, as far as recorded."""
    data = part(part(made, "calibration"), "data")
    table = {
        "base model": part(made, "model").get("name"),
        "allocator": made.get("allocator"),
        "decomposer": made.get("decomposer"),
        "fine-tuning": recovery_text(made),
    }
    if data:
        table["calibration"] = (
            f"{data.get('samples')} × {data.get('seqlen')} tokens of {data.get('dataset')}"
        )
    table["stages"] = stages_text(made)
    return {name: str(value) for name, value in table.items() if value}


def stages_text(made: Mapping[str, Any]) -> str:
    """Describe the stages in which a checkpoint was made; empty for one stage or if unknown."""
    stages = made.get("stages")
    if not isinstance(stages, list) or not stages or not isinstance(stages[0], dict):
        return ""
    return f"{len(stages)}, with {stages[0].get('correction')} correction in between"
