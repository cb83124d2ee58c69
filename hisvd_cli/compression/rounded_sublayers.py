"""Tensors of a sublayer, dense or low-rank ─► tensors of integers on disk.

With 4 bits a pair is first written in another basis of its inner dimension, (U Q)(Qᵀ V) with U's
columns orthonormal and Q a random rotation: the same product, but no row or column that stands out,
and moments whose error compensation gains most (incoherence, Chee et al. 2023, arXiv 2307.13304;
where the rotation stands between two stored factors it costs nothing). A pivoted pair has no such
freedom, and its coefficients multiply the errors of the rows that they are applied to. So with 4
bits it becomes a plain pair. Mean share of the output's energy that was lost at 4 bits in groups of
64 (SmolLM2-135M, ``best`` at keep 0.8, gate_proj of three blocks, factors rounded once): pivoted
0.103, with C fitted again 0.014; pair 0.0081, with U fitted again 0.0064, rotated as well 0.0023.
Legend: as in :mod:`hisvd_cli.compression.rounding`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hisvd_cli.compression.rounding import (
    Metric,
    Rounded,
    metric_of,
    round_compensated,
    round_nearest,
)
from hisvd_cli.modeling.layers.lowrank import dense_product

_TURNS = 3
"""How often both factors are rounded. Seen at 4 bits in groups of 64 (SmolLM2-135M, ``best`` at
keep 0.8, block 12), share of the output's energy that is lost after 1, 2, 3 and 5 turns: down_proj
0.0070, 0.0047, 0.0044, 0.0041; o_proj 0.0039, 0.0034, 0.0033, 0.0032."""
_FIT_DAMPING = 1e-4
"""Added to the diagonal of the moment that U is fitted in, as a share of its mean."""


def quantize_nearest(factors: Mapping[str, Tensor], bits: int, group: int) -> dict[str, Tensor]:
    """Return the tensors on disk of a sublayer, each of its matrices rounded by itself.

    Args:
        factors: the tensors of a dense, low-rank or pivoted sublayer, by their names.
        bits: 8 or 4.
        group: columns that share a scale, with 4 bits.

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
    """Return the tensors on disk of a sublayer, the errors of its matrices made up for.

    V is rounded in the metric of H; U is fitted to what V has become, by least squares of the
    output, and rounded in the metric of V̂ H V̂ᵀ; V is fitted to that, and so on, a few times. Of a
    pivoted sublayer they are V′ and C.

    Args:
        factors: the tensors of a dense, low-rank or pivoted sublayer, by their names.
        metric: of its input's moment H ``[n, n]``.
        bits: 8 or 4.
        group: columns that share a scale, with 4 bits.
        damping: of the metric of V̂ H V̂ᵀ, see :func:`metric_of`.

    Raises:
        NumericalError: see :func:`round_nearest` and :func:`metric_of`.
    """
    parts = _prepared(factors, bits)
    v = parts["weight"].double()
    if "weight_u" not in parts:
        return round_compensated(v, metric, bits, group).stored("weight")
    whole, pair = whole_u(parts), (parts["weight_u"].double(), v)
    first, second = _round_both(v, pair, metric, bits, group, damping)
    for _ in range(_TURNS - 1):
        u = whole_u({**parts, "weight_u": second.matrix()})
        v = torch.linalg.solve(_damped(u.T @ u), (u.T @ whole) @ pair[1])
        first, second = _round_both(v, pair, metric, bits, group, damping)
    return dict(parts) | first.stored("weight") | second.stored("weight_u")


def _round_both(
    v: Tensor, pair: tuple[Tensor, Tensor], metric: Metric, bits: int, group: int, damping: float
) -> tuple[Rounded, Rounded]:
    """Round V, fit U so that U V̂ is nearest to the product of ``pair``, and round it."""
    first = round_compensated(v, metric, bits, group)
    hat = first.matrix().double()
    seen = hat @ metric.moment.double()
    inner = seen @ hat.T
    fitted = torch.linalg.solve(_damped(inner), (seen @ pair[1].T) @ pair[0].T).T
    return first, round_compensated(fitted, metric_of(inner, damping), bits, group)


def _damped(moment: Tensor) -> Tensor:
    added = _FIT_DAMPING * float(moment.diagonal().mean()) or 1.0
    return moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _prepared(factors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return the factors as they are rounded: with 4 bits a pair in a basis that rounds well."""
    if bits != 4 or "weight_u" not in factors:
        return dict(factors)
    u, v = whole_u(factors), factors["weight"].double()
    q, triangle = torch.linalg.qr(u)  # of fewer rows than columns, q is square
    if q.shape[1] < u.shape[1]:
        return {"weight": v, "weight_u": u}
    turn = _rotation(q.shape[1]).to(q)
    return {"weight": turn.T @ (triangle @ v), "weight_u": q @ turn}


def whole_u(factors: Mapping[str, Tensor]) -> Tensor:
    """Return U ``[m, r]`` of a pair, plain or pivoted, in float64."""
    u = factors["weight_u"].double()
    if "weight_order" not in factors:
        return u
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return dense_product({**factors, "weight": identity, "weight_u": u})


def _rotation(size: int) -> Tensor:
    """Return a random rotation ``[size, size]``, always the same."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.as_tensor(torch.linalg.qr(drawn)[0])
