"""The sublayers of an inspected model as they are stored: shapes, ranks and parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.modeling.layers.lowrank import Storage, factor_shapes
from hisvd_cli.modeling.layers.quantized import quantized_shapes, storage_with
from hisvd_cli.modeling.layers.shapes import (
    Shape,
    active_parameters,
    copies,
    is_stack,
    matrix_of,
    numel,
    storage_of,
)
from hisvd_cli.modeling.structure.sublayers import Sublayer


@dataclass(frozen=True)
class Layout:
    """How sublayers are stored according to a config or a plan.

    Attributes:
        ranks: name → rank, for low-rank sublayers.
        storage: storage of their factors.
        bits: name → 8 or 4, for quantized sublayers.
        group_size: columns per scale with 4 bits.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    storage: Storage = "pair"
    bits: Mapping[str, int] = field(default_factory=dict)
    group_size: int = 1

    def line(self) -> str:
        """Return a summary of the quantization in one line."""
        counts = sorted(Counter(self.bits.values()).items())
        kinds = ", ".join(f"int{bits} in {count} layers" for bits, count in counts)
        return kinds + (f", groups of {self.group_size}" if 4 in self.bits.values() else "")


@dataclass(frozen=True)
class Row:
    """One sublayer on disk; ``rank`` is the full rank if it is dense, ``bits`` the bits per stored
    value."""

    name: str
    layer: int | None
    cluster: str
    shape: Shape
    rank: int
    dense: bool
    dtype: str
    storage: Storage = "pair"
    bits: int | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the factors or of the dense matrix; of quantized layers, the number of
        codes."""
        if self.dense:
            return numel(self.shape)
        return sum(map(prod, _factors(self.shape, self.rank, self.storage).values()))


def rows_of(sublayers: Iterable[Sublayer], dtypes: Mapping[str, str], layout: Layout) -> list[Row]:
    """Return one row per sublayer.

    Args:
        sublayers: sublayers of the dense model.
        dtypes: tensor name on disk → dtype.
        layout: how they are stored.
    """
    rows = []
    for s in sublayers:
        rank, bits = layout.ranks.get(s.name), layout.bits.get(s.name)
        names = (f"{s.name}.weight", f"{s.members[0]}.weight", s.name)
        dtype = next((dtypes[name] for name in names if name in dtypes), "")
        full = full_rank(s.shape) if rank is None else rank
        storage = storage_with(bits, storage_of(s.shape, layout.storage))
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
    """Return tensor name → shape for every low-rank or quantized sublayer; the tensors of others
    are those of the model.

    Args:
        sublayers: sublayers of the dense model.
        layout: how they are stored.
        packed: for quantized layers, return the shapes on disk, with scales, instead of the shapes
            of the matrices.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for s in sublayers:
        rank, bits = layout.ranks.get(s.name), layout.bits.get(s.name)
        if rank is None and not bits:
            continue
        storage = storage_with(bits, layout.storage)
        tensors = {"weight": s.shape} if rank is None else _factors(s.shape, rank, storage)
        if bits and packed:
            tensors = quantized_shapes(tensors, bits, layout.group_size)
        shapes |= {f"{s.name}.{leaf}": shape for leaf, shape in tensors.items()}
    return shapes


def _factors(shape: Shape, rank: int, storage: Storage) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the factors of a sublayer."""
    single = factor_shapes(storage_of(shape, storage), *matrix_of(shape), rank)
    count = (copies(shape),) if is_stack(shape) else ()
    return {leaf: (*count, *each) for leaf, each in single.items()}


def active_on_disk(
    rows: Sequence[Row], parameters: int, dense: int, experts: int | None
) -> tuple[int, int] | None:
    """Return the parameters that one token uses, on disk and in the original model; None without
    stacks of experts, or if it is unknown.

    Args:
        rows: the sublayers.
        parameters: parameters on disk.
        dense: parameters of the original model.
        experts: experts per token.
    """
    stacks = [row for row in rows if is_stack(row.shape)]
    used = active_parameters(parameters, [(s.shape, s.parameters) for s in stacks], experts)
    whole = active_parameters(dense, [(s.shape, numel(s.shape)) for s in stacks], experts)
    return (used, whole) if stacks and used is not None and whole is not None else None
