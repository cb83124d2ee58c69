"""FWSVD and GFWSVD: weighted by Fisher information of whole sequences."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.references.common import Study, Weights, cholesky, head, inverse, svd, uniform_ranks

ITERATIONS = 50
TOLERANCE = 1e-2


def fwsvd(study: Study, ratio: float) -> Weights:
    """FWSVD (arXiv 2207.00112): SVD of D W, D the root of each row's summed diagonal Fisher.

    The Fisher information is the mean square of the gradient of one sequence's loss.
    """
    weights: Weights = {}
    for s in study.sublayers:
        rank = uniform_ranks(study, ratio)[s.name]
        assert rank is not None
        fisher = (study.weight_gradients[s.name] ** 2).mean(0)
        rows = fisher.sum(1).sqrt()
        rows = torch.where(rows > 0, rows, torch.ones_like(rows))
        weights[s.name] = head(svd(rows[:, None] * s.weight), rank) / rows[:, None]
    return weights


def gfwsvd(study: Study, ratio: float) -> Weights:
    """GFWSVD (arXiv 2505.17974): the Kronecker product A ⊗ B nearest to the empirical Fisher.

    It is the first pair of singular vectors of the rearranged Fisher matrix, whose products with a
    matrix are Σ D B Dᵀ and Σ Dᵀ A D; found by power iteration (the paper: Lanczos). Then
    W′ = L_A⁻ᵀ (L_Aᵀ W L_B)_k L_B⁻¹ with the Cholesky factors of A ``[m, m]`` and B ``[n, n]``.
    """
    weights: Weights = {}
    for s in study.sublayers:
        rank = uniform_ranks(study, ratio)[s.name]
        assert rank is not None
        left, right = _factors(study, s.name)
        low = head(svd(left.T @ s.weight @ right), rank)
        weights[s.name] = inverse(left).T @ low @ inverse(right)
    return weights


@cache
def _factors(study: Study, name: str) -> tuple[Tensor, Tensor]:
    left, right = nearest_kronecker(study.weight_gradients[name])
    return cholesky(left), cholesky(right)


def nearest_kronecker(gradients: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """A ``[m, m]`` and B ``[n, n]``, each of norm 1, of gradients ``[S, m, n]``."""
    beside = torch.cat(list(gradients), dim=1)  # [m, S·n]
    below = torch.cat(list(gradients), dim=0)  # [S·m, n]
    right = torch.eye(gradients.shape[2], dtype=gradients.dtype)
    for _ in range(iterations):
        before = right
        left = torch.cat(list(gradients @ right), dim=1) @ beside.T
        left = left / left.norm()
        right = torch.cat(list(left @ gradients), dim=0).T @ below
        right = right / right.norm()
        if float((right - before).norm()) < TOLERANCE:
            break
    return left, right
