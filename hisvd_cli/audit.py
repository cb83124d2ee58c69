"""What an inspection finds: sublayers as they are on disk, totals, and problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from hisvd_cli.budget import full_rank
from hisvd_cli.lowrank import Storage, factor_shapes, is_order
from hisvd_cli.plan import Plan
from hisvd_cli.sublayers import Sublayer


def part(document: object, name: str) -> dict[str, Any]:
    """Return an object inside an object of JSON data, empty where a file holds something else."""
    inner = document.get(name) if isinstance(document, dict) else None
    return inner if isinstance(inner, dict) else {}


@dataclass(frozen=True)
class Row:
    """One sublayer as found: ``rank`` is the full rank where it is dense."""

    name: str
    layer: int | None
    cluster: str
    shape: tuple[int, int]
    rank: int
    dense: bool
    dtype: str
    storage: Storage = "pair"

    @property
    def parameters(self) -> int:
        """Parameters of the pair, or of the dense matrix."""
        if self.dense:
            return prod(self.shape)
        return sum(map(prod, factor_shapes(self.storage, *self.shape, self.rank).values()))


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        kind: checkpoint, pt, plan, calibration or model.
        target: what was inspected, as the user named it.
        parameters: of everything on disk, None where that is not known.
        dense_parameters: of the model before compression, None where that is not known.
        bytes: on disk, of weights.
        sublayers: a row each.
        provenance: what the files say of how they were made.
        problems: what is wrong, a line each.
        table: name → value, for a person.
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

    @property
    def ratio(self) -> float | None:
        """Share kept of the sublayers, or None where there are none."""
        full = sum(row.shape[0] * row.shape[1] for row in self.sublayers)
        return sum(row.parameters for row in self.sublayers) / full if full else None

    @property
    def model_ratio(self) -> float | None:
        """Share kept of the whole model."""
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
            "bytes": self.bytes,
            "sublayers": [asdict(row) for row in self.sublayers],
            "provenance": self.provenance,
            "problems": self.problems,
        }

    def line(self) -> str:
        """Return the outcome in one line."""
        count = len(self.problems)
        return f"{self.kind}: {count or 'no'} problem{'s' * (count != 1)}"


def rows_of(
    sublayers: Iterable[Sublayer],
    ranks: Mapping[str, int],
    dtypes: Mapping[str, str],
    storage: Storage = "pair",
) -> list[Row]:
    """Return a row per sublayer: low rank where ``ranks`` names one.

    Args:
        sublayers: of the dense model.
        ranks: name → rank of the low-rank ones.
        dtypes: name of a tensor on disk → its dtype.
        storage: how the low-rank ones are written.
    """
    rows = []
    for s in sublayers:
        rank = ranks.get(s.name)
        dtype = dtypes.get(f"{s.name}.weight", "")
        full = full_rank(s.shape) if rank is None else rank
        rows.append(Row(s.name, s.layer, s.cluster, s.shape, full, rank is None, dtype, storage))
    return rows


def sublayer_shapes(
    sublayers: Iterable[Sublayer], ranks: Mapping[str, int], storage: Storage
) -> dict[str, tuple[int, ...]]:
    """Return tensor name → shape of every sublayer: factors where ``ranks`` names one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for s in sublayers:
        rank = ranks.get(s.name)
        tensors = {"weight": s.shape} if rank is None else factor_shapes(storage, *s.shape, rank)
        shapes |= {f"{s.name}.{leaf}": shape for leaf, shape in tensors.items()}
    return shapes


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Compare the shapes of tensors on disk with those that a config asks for."""
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name}: missing.")
        elif found[name] != shape:
            problems.append(f"{name}: {list(found[name])} on disk, {list(shape)} by config.json.")
    return problems


def value_problems(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Find values that are no numbers, and orders of rows that are none."""
    problems = []
    for name, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            problems.append(f"{name}: holds values that are NaN or infinite.")
        elif name.endswith(".weight_order") and not is_order(tensor):
            problems.append(f"{name}: is no order of rows.")
    return problems


def plan_problems(plan: Plan, rows: Iterable[Row]) -> list[str]:
    """Compare the ranks found with those of the plan that came with them."""
    found = {row.name: row for row in rows}
    problems = []
    for planned in plan.sublayers:
        row = found.get(planned.name)
        if row is None or (row.rank, row.parameters) != (planned.rank, planned.parameters):
            have = "absent" if row is None else f"rank {row.rank}"
            problems.append(f"{planned.name}: {have}, but the plan says rank {planned.rank}.")
    return problems


def told_recovery(made: Mapping[str, Any]) -> str:
    """Return in a line what a provenance says of a short training, empty where there was none."""
    trained = part(made, "recovery")
    if not trained:
        return ""
    dataset = Path(str(part(trained, "data").get("dataset"))).name
    return f"{trained.get('method')}, {int(trained.get('tokens') or 0):,} tokens of {dataset}"


def provenance_table(made: dict[str, Any]) -> dict[str, str]:
    """Return the lines that a person reads of how a checkpoint was made, as far as they are
    recorded."""
    data = part(part(made, "calibration"), "data")
    table = {
        "made from": part(made, "model").get("name"),
        "allocator": made.get("allocator"),
        "decomposer": made.get("decomposer"),
        "recovery": told_recovery(made),
    }
    if data:
        table["calibration"] = (
            f"{data.get('samples')} × {data.get('seqlen')} tokens of {data.get('dataset')}"
        )
    return {name: str(value) for name, value in table.items() if value}
