"""SVD-LLM, SVD-LLM V2 and RSVD-LLM: whitened truncation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.references.common import Study, Weights, inverse, snapped, tails, uniform_ranks


def svd_llm(study: Study, ratio: float) -> Weights:
    """SVD-LLM (arXiv 2403.07378), truncation-aware data whitening, without its later updates."""
    return study.whitened_weights(uniform_ranks(study, ratio))


def svd_llm_v2(study: Study, ratio: float) -> Weights:
    """SVD-LLM V2 (arXiv 2503.12340), Algorithm 1: within a type, what is removed ∝ 1/log(loss).

    The loss is the Frobenius norm of the output error over all calibration tokens, at the uniform
    rank. The algorithm takes no care of a loss below 1, whose log is negative; none is here.
    """
    uniform = uniform_ranks(study, ratio)
    ranks = {}
    for members in study.by_kind().values():
        scores = []
        for s in members:
            rank = uniform[s.name]
            assert rank is not None
            loss = math.sqrt(tails(study.whitened[s.name][1])[rank])
            assert loss > 1, f"{s.name}: the log of a loss of {loss} is not positive"
            scores.append(1 / math.log(loss))
        for s, score in zip(members, scores, strict=True):
            removed = (1 - ratio) * len(members) * score / sum(scores)
            ranks[s.name] = snapped(s, (1 - removed) * s.break_even)
    return study.whitened_weights(ranks)


def rsvd_llm(study: Study, ratio: float) -> Weights:
    """SVD-LLM with a randomized decomposition: 10 oversamples, 2 power iterations.

    The range finder is that of Halko, Martinsson and Tropp (2011), Algorithm 4.4.
    """
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}
    for s in study.sublayers:
        rank = uniform_ranks(study, ratio)[s.name]
        assert rank is not None
        factor = study.cholesky_of_inputs[s.name]
        low = _randomized(s.weight @ factor, rank, generator)
        weights[s.name] = low @ inverse(factor)
    return weights


def _randomized(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    columns = min(rank + 10, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, dtype=matrix.dtype, generator=generator)
    basis: Tensor = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, sigma, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    low: Tensor = basis @ ((u[:, :rank] * sigma[:rank]) @ v[:rank])
    return low
