"""The leading eigenvectors by block iteration: products of the matrix, and one small eigenproblem.

A random block is drawn towards the leading eigenvectors by Chebyshev polynomials of the matrix that
are small on the part of the spectrum not wanted (Zhou, Saad, Tiago and Chelikowsky 2006), made
orthonormal by Cholesky's factor twice, and turned to eigenvectors within its span (Rayleigh and
Ritz). Where products cost little beside eigendecompositions, or few vectors are wanted, that is the
shorter way.

Legend: A ``[p, p]``, positive semidefinite; k vectors wanted, a block of b > k; θ Ritz values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hisvd_cli.linalg.products import mirrored_product, orthonormal

EXCESS = 1e-3
"""By what share of the optimum the loss of a truncation may lie above it."""
_EXTRA = 8  # one vector more for each so many that are wanted
_LEAST_EXTRA = 16
_MOST = 0.75  # share of all vectors from which on a block saves nothing
_DEGREE = 6
_ROUNDS = 5


def leading_subspace(gram: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return nearly the largest eigenvalues ``[k]`` and their eigenvectors ``[p, k]``, falling.

    Args:
        gram: A ``[p, p]``, symmetric.
        rank: k.

    Returns:
        None where the loss ``tr A − Σ θ`` may lie more than ``EXCESS`` above the least one,
        ``Σ_{j>k} λ_j``, or where the block would be nearly all of A.
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
    """Return θ ``[b]``, falling, their Ritz vectors X ``[p, b]`` and A X."""
    image = gram @ block
    values, turn = torch.linalg.eigh(mirrored_product(block.T, image.T))
    turn = turn.flip(1)
    return values.flip(0), block @ turn, image @ turn


def _excess(values: Tensor, block: Tensor, image: Tensor, rank: int) -> float:
    """Return how much larger the sum of the k largest eigenvalues may be than that of θ.

    ``Σ_{i≤k} ‖A x_i − θ_i x_i‖² / (θ_i − c)`` (Kato and Temple), c an eigenvalue that nothing
    outside the block exceeds: taken to be the Ritz value halfway between the k-th and the last,
    which lies above the first that the block leaves out unless it is far from done.
    """
    gaps = (values[:rank] - values[(rank + len(values)) // 2]).double()
    residuals = (image[:, :rank] - block[:, :rank] * values[:rank]).double().square().sum(0)
    return float((residuals / gaps.clamp_min(torch.finfo(values.dtype).tiny)).sum())


def _filter(gram: Tensor, block: Tensor, image: Tensor, bound: float) -> Tensor:
    """Return T_d(2A/c − 1) X, its columns scaled to unit norm: T_d, Chebyshev's polynomial, stays
    within ± 1 on [0, c] and grows fast above.

    Args:
        gram: A.
        block: Ritz vectors X ``[p, b]``; each grows by a factor of its own, so scaling at the end
            keeps the columns apart.
        image: A X.
        bound: c.
    """
    before, now = block, image * (2 / bound) - block
    for _ in range(_DEGREE - 1):
        before, now = now, torch.addmm(before, gram, now, beta=-1, alpha=4 / bound).sub_(2 * now)
        norms = now.norm(dim=0)
        before, now = before / norms, now / norms
    return now
