"""Corrections of truncated weights between two truncations (ZS-SVD, arXiv 2602.02848).

Legend, for one sublayer: W_T the original weight (of the teacher), W the truncated one, multiplied
out, both ``[m, n]``; Δ = W_T − W; g ``[m, n]`` the gradient at W of the mean loss per token, over
one batch. ⟨a, b⟩ is the sum of the products of all entries.

The paper applies one of these corrections and truncates again. The authors' code
(mint-vu/Zero-Sum-SVD, ``compression/corrections.py``) adds a constant to the divisors. Here all
directions are normalised first, so that the scale of gradients does not affect the result, and a
zero gradient or a zero Δ gives no correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["pull-subspace", "project-to-delta", "alpha-blend", "gradient-step"]
BY_GRADIENT: tuple[Correction, ...] = ("pull-subspace", "project-to-delta", "gradient-step")
"""Corrections that need gradients of the truncated model."""
_CHUNK = 1 << 22


def correction(
    method: Correction, delta: Tensor, gradients: Sequence[Tensor], *, alpha: float, step: float
) -> Tensor:
    """Return the correction ``[m, n]`` to add to W.

    Args:
        method: the method.
        delta: Δ.
        gradients: g of each batch, of equal size; empty for ``alpha-blend``. All methods but
            ``pull-subspace`` use their mean.
        alpha: share of Δ that ``alpha-blend`` adds.
        step: η of ``gradient-step``.
    """
    if method == "alpha-blend":
        return alpha * delta
    if method == "pull-subspace":
        return pull_subspace(delta, gradients)
    mean = torch.stack(list(gradients)).mean(0)
    return project_to_delta(delta, mean) if method == "project-to-delta" else -step * mean


def pull_subspace(delta: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Return the projection of Δ onto the span of the batch gradients; for one, (⟨g,Δ⟩/⟨g,g⟩) g.

    It never increases the distance to the teacher: ‖Δ − projection‖ ≤ ‖Δ‖. Combinations of
    gradients that are 0 within the precision of float32 are ignored.
    """
    units = [unit for unit in map(_unit, gradients) if unit is not None]
    if not units:
        return torch.zeros_like(delta)
    products = [[_inner(a, b) for b in units] for a in units]
    gram = torch.tensor(products, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    # Eigenvalues are squares of singular values, which are accurate to K·eps of the largest.
    smallest = (len(units) * torch.finfo(torch.float32).eps) ** 2
    spanned = values > smallest * values[-1]
    projections = torch.tensor([_inner(unit, delta) for unit in units], dtype=torch.float64)
    basis = vectors[:, spanned]
    shares = basis @ ((basis.T @ projections) / values[spanned])
    total = torch.zeros_like(delta)
    for share, unit in zip(shares.tolist(), units, strict=True):
        total += share * unit
    return total


def project_to_delta(delta: Tensor, gradient: Tensor) -> Tensor:
    """Return the projection of the mean gradient onto Δ: (⟨g,Δ⟩/⟨Δ,Δ⟩) Δ.

    The sign is that of the authors' code: if the loss falls towards the teacher (⟨g,Δ⟩ < 0), the
    correction points away from it and adds ⟨g,Δ⟩²/⟨Δ,Δ⟩ to the loss, to first order.
    """
    unit = _unit(delta)
    return torch.zeros_like(delta) if unit is None else _inner(gradient, unit) * unit


def _unit(direction: Tensor) -> Tensor | None:
    """Return a matrix normalised to length 1, None if it is zero. Division by the largest entry
    first keeps squares in the range of float32."""
    largest = direction.abs().max()
    if not bool(largest):
        return None
    scaled = direction / largest
    return scaled / float(torch.linalg.vector_norm(scaled, dtype=torch.float64))


def _inner(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ in float64, in chunks."""
    pairs = zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)
