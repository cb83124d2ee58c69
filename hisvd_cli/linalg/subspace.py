"""Leading eigenvectors by block subspace iteration with Chebyshev filtering.

A random block is multiplied by Chebyshev polynomials of the matrix that are small on the unwanted
part of the spectrum (Zhou, Saad, Tiago and Chelikowsky 2006), orthonormalized by CholeskyQR2, and
rotated to Ritz vectors. This is faster than an eigendecomposition if products are cheap or few
vectors are wanted.

Legend: A ``[p, p]``, positive semidefinite; k wanted vectors, a block of b > k; θ Ritz values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hisvd_cli.linalg.products import mirrored_product, orthonormal

EXCESS = 1e-3
"""Allowed excess of the truncation loss, relative to the optimum."""
_EXTRA = 8  # one extra vector per this many wanted ones
_LEAST_EXTRA = 16
_MOST = 0.75  # share of all vectors beyond which a block is not faster
_DEGREE = 6
_ROUNDS = 5


def leading_subspace(gram: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return approximations of the largest eigenvalues ``[k]`` and their eigenvectors ``[p, k]``,
    in descending order.

    Args:
        gram: A ``[p, p]``, symmetric.
        rank: k.

    Returns:
        None if the loss ``tr A − Σ θ`` may exceed the optimum ``Σ_{j>k} λ_j`` by more than
        ``EXCESS``, or if the block would be nearly as large as A.
    """
    size = len(gram)
    width = rank + max(_LEAST_EXTRA, rank // _EXTRA)
    if width > _MOST * size or not bool(gram.isfinite().all()):
        return None
    total = float(gram.diagonal().double().sum())
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, width, generator=generator, dtype=gram.dtype).to(gram.device)
    block = torch.linalg.qr(gram @ torch.linalg.qr(gram @ block).Q).Q
    for _ in range(_ROUNDS):
        values, block, image = _ritz(gram, block)
        loss = total - float(values[:rank].double().sum())
        if _excess(values, block, image, rank) <= EXCESS / 2 * loss:
            return values[:rank], block[:, :rank].contiguous()
        filtered = orthonormal(_filter(gram, block, image, float(values[-1])))
        if filtered is None:
            return None
        block = filtered
    return None


def _ritz(gram: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ ``[b]`` in descending order, the Ritz vectors X ``[p, b]``, and A X."""
    image = gram @ block
    values, turn = torch.linalg.eigh(mirrored_product(block.T, image.T))
    turn = turn.flip(1)
    return values.flip(0), block @ turn, image @ turn


def _excess(values: Tensor, block: Tensor, image: Tensor, rank: int) -> float:
    """Bound how much the sum of the k largest eigenvalues exceeds that of their Ritz values.

    ``Σ_{i≤k} ‖A x_i − θ_i x_i‖² / (θ_i − c)`` (Kato and Temple), where c bounds the eigenvalues
    outside the block. The Ritz value halfway between the k-th and the last is used for c: it
    exceeds them unless the iteration is far from convergence.
    """
    gaps = (values[:rank] - values[(rank + len(values)) // 2]).double()
    residuals = (image[:, :rank] - block[:, :rank] * values[:rank]).double().square().sum(0)
    return float((residuals / gaps.clamp_min(torch.finfo(values.dtype).tiny)).sum())


def _filter(gram: Tensor, block: Tensor, image: Tensor, bound: float) -> Tensor:
    """Return T_d(2A/c − 1) X with columns scaled to unit norm. The Chebyshev polynomial T_d stays
    within ±1 on [0, c] and grows fast above.

    Args:
        gram: A.
        block: Ritz vectors X ``[p, b]``; each is scaled by a different factor, so that
            normalization keeps the columns separate.
        image: A X.
        bound: c.
    """
    before, now = block, image * (2 / bound) - block
    for _ in range(_DEGREE - 1):
        before, now = now, torch.addmm(before, gram, now, beta=-1, alpha=4 / bound).sub_(2 * now)
        norms = now.norm(dim=0)
        before, now = before / norms, now / norms
    return now
