"""What is added to a truncated weight before it is truncated again (ZS-SVD, arXiv 2602.02848).

Legend, for one sublayer: W_T the weight of the model as it was published (the teacher), W the
truncated one, multiplied out, both ``[m, n]``; Δ = W_T − W; g ``[m, n]`` the gradient at W of the
mean loss of a token, over one batch. ⟨a, b⟩ is the sum of all products of entries.

The paper applies one of these and truncates again; its program (mint-vu/Zero-Sum-SVD,
``compression/corrections.py``) adds a constant to the divisors. Here every direction is brought to
length 1 first, so that neither tiny nor huge gradients change a result, and a zero gradient or a
zero Δ gives no correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["pull-subspace", "project-to-delta", "alpha-blend", "gradient-step"]
BY_GRADIENT: tuple[Correction, ...] = ("pull-subspace", "project-to-delta", "gradient-step")
"""Those that need gradients at the truncated model."""
_CHUNK = 1 << 22


def correction(
    method: Correction, delta: Tensor, gradients: Sequence[Tensor], *, alpha: float, step: float
) -> Tensor:
    """Return what is added to W ``[m, n]`` by a method.

    Args:
        method: which.
        delta: Δ.
        gradients: g of each batch, of equal size; none for ``alpha-blend``. All but
            ``pull-subspace`` take their mean.
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
    """Return the projection of Δ onto the span of batch gradients: for one, (⟨g,Δ⟩/⟨g,g⟩) g.

    It never leads away from the teacher: ‖Δ − projection‖ ≤ ‖Δ‖. Combinations of gradients that
    are not told apart from 0 by float32, in which gradients are summed, span nothing.
    """
    units = [unit for unit in map(_unit, gradients) if unit is not None]
    if not units:
        return torch.zeros_like(delta)
    products = [[_inner(a, b) for b in units] for a in units]
    gram = torch.tensor(products, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    # Eigenvalues are squares of singular values, which are known to K·eps of the largest.
    smallest = (len(units) * torch.finfo(torch.float32).eps) ** 2
    spanned = values > smallest * values[-1]
    seen = torch.tensor([_inner(unit, delta) for unit in units], dtype=torch.float64)
    basis = vectors[:, spanned]
    shares = basis @ ((basis.T @ seen) / values[spanned])
    total = torch.zeros_like(delta)
    for share, unit in zip(shares.tolist(), units, strict=True):
        total += share * unit
    return total


def project_to_delta(delta: Tensor, gradient: Tensor) -> Tensor:
    """Return the part of the mean gradient along Δ: (⟨g,Δ⟩/⟨Δ,Δ⟩) Δ.

    With the sign of the published program: where the loss falls towards the teacher (⟨g,Δ⟩ < 0)
    it leads away from it, and to first order adds ⟨g,Δ⟩²/⟨Δ,Δ⟩ to the loss.
    """
    unit = _unit(delta)
    return torch.zeros_like(delta) if unit is None else _inner(gradient, unit) * unit


def _unit(direction: Tensor) -> Tensor | None:
    """Return a matrix at length 1, None for zero; its largest entry first becomes 1, so that no
    square leaves the range of float32."""
    largest = direction.abs().max()
    if not bool(largest):
        return None
    scaled = direction / largest
    return scaled / float(torch.linalg.vector_norm(scaled, dtype=torch.float64))


def _inner(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ in float64, a few entries at a time."""
    pairs = zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)
