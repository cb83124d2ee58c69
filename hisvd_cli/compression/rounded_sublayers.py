"""Quantizes the tensors of a sublayer, dense or low-rank.

At 4 bits, the inner basis of a pair is changed first, (U Q)(Qᵀ V) with orthonormal columns of U and
a random rotation Q. The product is the same, but rows and columns have no outliers, and error
compensation is more effective (incoherence, Chee et al. 2023, arXiv 2307.13304); between two stored
factors, the rotation is free. A pivoted pair has no such freedom, and its coefficients amplify the
errors of its rows, so that it becomes a plain pair at 4 bits. Mean share of lost output energy at 4
bits in groups of 64 (SmolLM2-135M, ``best`` at keep ratio 0.8, gate_proj of three blocks, factors
rounded once): pivoted 0.103, with C refitted 0.014; pair 0.0081, with U refitted 0.0064, also
rotated 0.0023. Legend: as in :mod:`hisvd_cli.compression.rounding`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hisvd_cli.compression.rounding import (
    Metric,
    Rounded,
    metric_of,
    round_compensated,
    round_nearest,
)
from hisvd_cli.modeling.layers.lowrank import FACTORS, Storage, dense_product, factor_shapes
from hisvd_cli.modeling.layers.quantized import storage_with

_ROUNDS = 3
"""How often both factors are rounded. Share of lost output energy after 1, 2, 3 and 5 rounds at 4
bits in groups of 64 (SmolLM2-135M, ``best`` at keep ratio 0.8, block 12): down_proj 0.0070, 0.0047,
0.0044, 0.0041; o_proj 0.0039, 0.0034, 0.0033, 0.0032."""
_FIT_DAMPING = 1e-4
"""Damping of the moment for fitting U, relative to its mean diagonal."""


def quantize_nearest(factors: Mapping[str, Tensor], bits: int, group: int) -> dict[str, Tensor]:
    """Return the tensors of a sublayer on disk, each matrix rounded to nearest.

    Args:
        factors: the tensors of a dense, low-rank or pivoted sublayer by name.
        bits: 8 or 4.
        group: columns that share a scale at 4 bits.

    Raises:
        NumericalError: see :func:`round_nearest`.
    """
    parts = _prepared(factors, bits)
    v, u = parts["weight"], parts.get("weight_u")
    stored = dict(parts) | round_nearest(v, bits, group).stored("weight")
    return stored if u is None else stored | round_nearest(u, bits, group).stored("weight_u")


def quantize_compensated(
    factors: Mapping[str, Tensor], metric: Metric, bits: int, group: int, damping: float
) -> dict[str, Tensor]:
    """Return the tensors of a sublayer on disk, rounded with error compensation.

    V is rounded in the metric of H. U is fitted to the rounded V, by least squares of the output,
    and rounded in the metric of V̂ H V̂ᵀ; V is then fitted to the rounded U, and so on for a few
    rounds. For a pivoted sublayer, the factors are V′ and C.

    Args:
        factors: the tensors of a dense, low-rank or pivoted sublayer by name.
        metric: the metric of the input moment H ``[n, n]``.
        bits: 8 or 4.
        group: columns that share a scale at 4 bits.
        damping: damping of the metric of V̂ H V̂ᵀ, see :func:`metric_of`.

    Raises:
        NumericalError: see :func:`round_nearest` and :func:`metric_of`.
    """
    parts = _prepared(factors, bits)
    v = parts["weight"].double()
    if "weight_u" not in parts:
        return round_compensated(v, metric, bits, group).stored("weight")
    whole, pair = whole_u(parts), (parts["weight_u"].double(), v)
    first, second = _round_both(v, pair, metric, bits, group, damping)
    for _ in range(_ROUNDS - 1):
        u = whole_u({**parts, "weight_u": second.matrix()})
        v = torch.linalg.solve(_damped(u.T @ u), (u.T @ whole) @ pair[1])
        first, second = _round_both(v, pair, metric, bits, group, damping)
    return dict(parts) | first.stored("weight") | second.stored("weight_u")


def _round_both(
    v: Tensor, pair: tuple[Tensor, Tensor], metric: Metric, bits: int, group: int, damping: float
) -> tuple[Rounded, Rounded]:
    """Round V, fit U such that U V̂ approximates the product of ``pair`` best, and round U."""
    first = round_compensated(v, metric, bits, group)
    hat = first.matrix().double()
    weighted = hat @ metric.moment.double()
    inner = weighted @ hat.T
    fitted = torch.linalg.solve(_damped(inner), (weighted @ pair[1].T) @ pair[0].T).T
    return first, round_compensated(fitted, metric_of(inner, damping), bits, group)


def _damped(moment: Tensor) -> Tensor:
    added = _FIT_DAMPING * float(moment.diagonal().mean()) or 1.0
    return moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _prepared(factors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return the factors to round; at 4 bits, a pair in a rotated basis."""
    if bits != 4 or "weight_u" not in factors:
        return dict(factors)
    u, v = whole_u(factors), factors["weight"].double()
    q, triangle = torch.linalg.qr(u)  # with fewer rows than columns, q is square
    if q.shape[1] < u.shape[1]:
        return {"weight": v, "weight_u": u}
    rotation = _rotation(q.shape[1]).to(q)
    return {"weight": rotation.T @ (triangle @ v), "weight_u": q @ rotation}


def whole_u(factors: Mapping[str, Tensor]) -> Tensor:
    """Return U ``[m, r]`` of a pair, plain or pivoted, in float64."""
    u = factors["weight_u"].double()
    if "weight_order" not in factors:
        return u
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return dense_product({**factors, "weight": identity, "weight_u": u})


def _rotation(size: int) -> Tensor:
    """Return a random rotation ``[size, size]`` with a fixed seed."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.as_tensor(torch.linalg.qr(drawn)[0])


def shapes_as_rounded(
    shapes: Mapping[str, tuple[int, ...]], bits: int, storage: Storage
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a sublayer's tensors in its storage at ``bits``."""
    if "weight_u" not in shapes or storage_with(bits, storage) == storage:
        return dict(shapes)
    rank, inputs = shapes["weight"]
    pair = factor_shapes("pair", shapes["weight_order"][0], inputs, rank)
    return {leaf: shape for leaf, shape in shapes.items() if leaf not in FACTORS[storage]} | pair


def by_sublayer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return module → names of its tensors within it."""
    found: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        found.setdefault(module, []).append(leaf)
    return found
