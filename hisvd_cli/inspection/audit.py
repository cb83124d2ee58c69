"""What an inspection finds: sublayers as they are on disk, totals, and problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.modeling.layers.lowrank import Storage, factor_shapes, is_order
from hisvd_cli.modeling.layers.quantized import SCALE, quantized_shapes, storage_with
from hisvd_cli.modeling.sublayers import Sublayer


def part(document: object, name: str) -> dict[str, Any]:
    """Return an object inside an object of JSON data, empty where a file holds something else."""
    inner = document.get(name) if isinstance(document, dict) else None
    return inner if isinstance(inner, dict) else {}


@dataclass(frozen=True)
class Layout:
    """How sublayers are stored, as a config or a plan says.

    Attributes:
        ranks: name → rank of the low-rank ones.
        storage: of those.
        bits: name → 8 or 4 of those of integers.
        group_size: columns that share a scale, with 4 bits.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    storage: Storage = "pair"
    bits: Mapping[str, int] = field(default_factory=dict)
    group_size: int = 1

    def line(self) -> str:
        """Say in a line how numbers are stored."""
        counts = sorted(Counter(self.bits.values()).items())
        kinds = ", ".join(f"int{bits} in {count} sublayers" for bits, count in counts)
        return kinds + (f", groups of {self.group_size}" if 4 in self.bits.values() else "")


@dataclass(frozen=True)
class Row:
    """One sublayer as found: ``rank`` is the full rank where it is dense, ``bits`` those of a
    number on disk."""

    name: str
    layer: int | None
    cluster: str
    shape: tuple[int, int]
    rank: int
    dense: bool
    dtype: str
    storage: Storage = "pair"
    bits: int | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the pair, or of the dense matrix; of integers, as many as there are
        codes."""
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
        dense_bytes: of the model before compression, in the dtype of the weights that are no
            integers; None where that is not known.
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
    dense_bytes: int | None = None

    @property
    def bytes_ratio(self) -> float | None:
        """Share of the whole model's bytes that are on disk."""
        return self.bytes / self.dense_bytes if self.dense_bytes else None

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
            "dense_bytes": self.dense_bytes,
            "bytes_ratio": self.bytes_ratio,
            "sublayers": [asdict(row) for row in self.sublayers],
            "provenance": self.provenance,
            "problems": self.problems,
        }

    def line(self) -> str:
        """Return the outcome in one line."""
        count = len(self.problems)
        return f"{self.kind}: {count or 'no'} problem{'s' * (count != 1)}"


def rows_of(sublayers: Iterable[Sublayer], dtypes: Mapping[str, str], layout: Layout) -> list[Row]:
    """Return a row per sublayer.

    Args:
        sublayers: of the dense model.
        dtypes: name of a tensor on disk → its dtype.
        layout: how they are stored.
    """
    rows = []
    for s in sublayers:
        rank, bits = layout.ranks.get(s.name), layout.bits.get(s.name)
        dtype = dtypes.get(f"{s.name}.weight", "")
        full = full_rank(s.shape) if rank is None else rank
        storage = storage_with(bits, layout.storage)
        bits = bits or _bits_of(dtype)
        rows.append(
            Row(s.name, s.layer, s.cluster, s.shape, full, rank is None, dtype, storage, bits)
        )
    return rows


def _bits_of(dtype: str) -> int | None:
    known = getattr(torch, dtype, None)
    return 8 * known.itemsize if isinstance(known, torch.dtype) else None


def sublayer_shapes(
    sublayers: Iterable[Sublayer], layout: Layout, *, packed: bool = True
) -> dict[str, tuple[int, ...]]:
    """Return tensor name → shape of every sublayer.

    Args:
        sublayers: of the dense model.
        layout: how they are stored.
        packed: of integers, as on disk, with their scales; else the shapes of the matrices.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for s in sublayers:
        rank, bits = layout.ranks.get(s.name), layout.bits.get(s.name)
        storage = storage_with(bits, layout.storage)
        tensors = {"weight": s.shape} if rank is None else factor_shapes(storage, *s.shape, rank)
        if bits and packed:
            tensors = quantized_shapes(tensors, bits, layout.group_size)
        shapes |= {f"{s.name}.{leaf}": shape for leaf, shape in tensors.items()}
    return shapes


def parameters_on_disk(
    matrices: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> int:
    """Return the parameters of the tensors found, each code of integers one, scales none.

    Args:
        matrices: name → shape, of integers those of the matrices.
        found: name → shape on disk.
    """
    return sum(
        prod(matrices.get(name, shape)) for name, shape in found.items() if not name.endswith(SCALE)
    )


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
        numbers = tensor.view(torch.float16) if name.endswith(SCALE) else tensor
        if not bool(numbers.isfinite().all()):
            problems.append(f"{name}: holds values that are NaN or infinite.")
        elif name.endswith(".weight_order") and not is_order(tensor):
            problems.append(f"{name}: is not a permutation of rows.")
    return problems


def plan_problems(plan: Plan, rows: Iterable[Row]) -> list[str]:
    """Compare the ranks found with those of the plan that came with them."""
    found = {row.name: row for row in rows}
    problems = []
    for planned in plan.sublayers:
        row = found.get(planned.name)
        # With 4 bits a pivoted pair has become a plain one, of more parameters.
        parameters = planned.parameters if row is None or row.bits == 4 else row.parameters
        if row is None or (row.rank, parameters) != (planned.rank, planned.parameters):
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
    table["stages"] = stages_text(made)
    return {name: str(value) for name, value in table.items() if value}


def stages_text(made: Mapping[str, Any]) -> str:
    """Say in how many stages a checkpoint was made, as far as it is recorded; empty for one."""
    stages = made.get("stages")
    if not isinstance(stages, list) or not stages or not isinstance(stages[0], dict):
        return ""
    return f"{len(stages)}, corrected by {stages[0].get('correction')} between"
