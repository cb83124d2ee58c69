"""Truncation in single precision, where that does not change the result.

Everything in float32 takes a CPU half the time. Rounding moves the eigenvalues of ``Lᵀ W G Wᵀ L``
by about ε times their sum each, and the loss of a truncation by no more than √p times that. Where
the loss itself is large beside it, the truncation is as good as the exact one; where it is not, as
for a layer whose inputs have a few huge channels, the answer is None and float64 must do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hisvd_cli.eigen import congruence, leading, mirrored_product
from hisvd_cli.metric import Metric, triangular_root
from hisvd_cli.moments import Moment

LEAST_SIZE = 1024
"""Smaller matrices take no time worth saving."""
TOLERANCE = 3e-3
"""How much of the optimal loss the bound on rounding may be. The bound is loose: where it was
5e-3, rounding added 1e-5 of the loss or less, and 5e-3 where it was 1.3e-2."""
_PROBES = 64

_EPSILON = torch.finfo(torch.float32).eps


def truncate_single(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the best replacement of W of rank k, from products in float32.

    Args:
        weight: W ``[m, n]``, on a CPU.
        metric: what is minimised; not transposed, and of moments.
        rank: k.

    Returns:
        U ``[m, k]`` and V ``[k, n]`` in float32; None where float32 may not be enough.

    Raises:
        LinAlgError: the eigenvectors did not converge.
    """
    size = min(weight.shape)
    moment = metric.right
    if not isinstance(moment, Moment) or size < LEAST_SIZE or rank >= size:
        return None
    if not bool(moment.matrix.isfinite().all()):
        return None
    single = Moment(moment.matrix.float(), moment.side)
    if metric.left is None and metric.narrows(weight):
        return _narrow(weight.float(), single, rank)
    if metric.left is not None and metric.left.ndim == 1:
        return None
    return _wide(weight.float(), metric.left, single, rank)


def _wide(
    weight: Tensor, left: Tensor | None, moment: Moment, rank: int
) -> tuple[Tensor, Tensor] | None:
    """Truncate by the eigenvectors of ``Lᵀ M L`` ``[m, m]``."""
    root = None if left is None else left.float()
    energy = moment.matrix if moment.side == "output" else congruence(weight, moment.matrix)
    scale = float(energy.diagonal().double().sum())
    gram = energy
    if root is not None:
        gram = congruence(root.T, energy)
        scale = float((root.double().square().sum(1) * energy.diagonal().double()).sum())
    found = _leading_if_sure(gram, rank, scale)
    if found is None:
        return None
    _, vectors = found
    weighted = weight if root is None else root.T @ weight
    u = vectors if root is None else torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return u, vectors.T @ weighted


def _narrow(weight: Tensor, moment: Moment, rank: int) -> tuple[Tensor, Tensor] | None:
    """Truncate where m > n, by the eigenvectors of ``Rᵀ WᵀW R`` ``[n, n]``, G = R Rᵀ.

    The columns of ``W R E`` span the best outputs; made orthonormal, they are U, and V = Uᵀ W: no
    inverse of G.
    """
    root = triangular_root(moment.matrix.double())
    if root is None:
        return None
    root = root.float()
    columns = mirrored_product(weight.T, weight.T)
    gram = congruence(root.T, columns)
    found = _leading_if_sure(gram, rank, float(gram.diagonal().double().sum()))
    if found is None:
        return None
    values, vectors = found
    u = _orthonormal(weight @ (root @ vectors) / values.sqrt())
    return None if u is None else (u, u.T @ weight)


def _orthonormal(columns: Tensor) -> Tensor | None:
    """Return orthonormal columns ``[m, k]`` of the same span, from nearly orthonormal ones: twice
    by Cholesky's factor (CholeskyQR2, Yamamoto and others 2015). None where they are not."""
    for _ in range(2):
        products = mirrored_product(columns.T, columns.T)
        factor, failed = torch.linalg.cholesky_ex(products, upper=True)
        if int(failed):
            return None
        columns = torch.linalg.solve_triangular(factor, columns, upper=True, left=False)
    return columns


def _leading_if_sure(gram: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return the leading eigenvalues and eigenvectors, or None where rounding may spoil them.

    Args:
        gram: symmetric ``[p, p]``.
        rank: how many.
        scale: the sum of what was added up for its diagonal.
    """
    total = float(gram.diagonal().double().sum())
    least = _EPSILON * math.sqrt(len(gram)) * scale / TOLERANCE  # loss that stands above rounding
    if _most_loss(gram, rank, total) < least:
        return None  # before the work of finding eigenvectors
    values, vectors = leading(gram, rank)
    sure = total - float(values.double().sum()) >= least and float(values[-1]) > 0
    return (values, vectors) if sure else None


def _most_loss(gram: Tensor, rank: int, total: float) -> float:
    """Return what a truncation loses at most: all eigenvalues but some large ones, those beyond the
    rank no larger than the others."""
    size = len(gram)
    count = min(_PROBES, rank)
    basis = torch.randn(size, count, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        basis = torch.linalg.qr(gram @ basis).Q
    large = float((basis * (gram @ basis)).double().sum())
    return (total - large) * (size - rank) / (size - count)
