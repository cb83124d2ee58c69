"""Truncation in the K-FAC metric of the loss, and what is built on it: ``best`` and LEMS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tests.references.common import (
    Ranks,
    Study,
    Sublayer,
    Weights,
    cholesky,
    head,
    inverse,
    knapsack,
    shrunk,
    svd,
    tails,
)

PROBE = 0.1
DEPTH = 5.0
INPUTS, GRADIENTS = 0.1, 0.3


def best(study: Study, ratio: float) -> Weights:
    """Ranks of least total discarded energy in the K-FAC metric, found exactly.

    The preset's aim, min Σ tail_l(r_l) within the budget with dense as a choice of loss 0, is
    solved by dynamic programming, costs rounded up to multiples of 100. Shrinkage 0.02 of the
    inputs' moment, 0.1 of the gradients'. Pairs are stored pivoted.
    """
    metric = _metric(study, 0.02, 0.1)
    losses: dict[str, Mapping[int | None, float]] = {
        s.name: {**dict(enumerate(metric.tails[s.name][: min(s.shape)])), None: 0.0}
        for s in study.sublayers
    }
    budget = study.budget(ratio)
    return metric.weights(knapsack(study, losses, budget, Sublayer.pivoted_cost, 100))


def lems(study: Study, ratio: float) -> Weights:
    """LEMS with KFAC-SVD (ICML 2026), without the search over its depth factor.

    The loss of a sublayer at rank r is the tail share at r over that at the probe rank (0.1 of
    break-even), times the KL divergence measured with that sublayer alone at the probe rank, times
    a factor that falls evenly from 1 + 5 at the first block to 1 at the last. Ranks between 0.3 and
    0.95 of break-even (from 0.1, where less than half is kept), or dense. Shrinkage 0.1 of the
    inputs' moment, 0.3 of the gradients'. The authors' program solves it with an integer
    programme, in multiples of 8.
    """
    metric = _metric(study, INPUTS, GRADIENTS)
    least = 0.3 if ratio >= 0.5 else 0.1
    last = max(s.block for s in study.sublayers)
    losses: dict[str, dict[int | None, float]] = {}
    for s in study.sublayers:
        tail = metric.tails[s.name]
        probe = max(int(PROBE * s.break_even), 1)
        scale = _divergences(study)[s.name] / tail[probe] * (1 + DEPTH * (last - s.block) / last)
        ranks = range(int(least * s.break_even), int(0.95 * s.break_even) + 1)
        losses[s.name] = {**{r: scale * tail[r] for r in ranks}, None: 0.0}
    return metric.weights(knapsack(study, losses, study.budget(ratio)))


@cache
def _metric(study: Study, inputs: float, gradients: float) -> Kfac:
    return Kfac(study, inputs, gradients)


@cache
@torch.no_grad()
def _divergences(study: Study) -> dict[str, float]:
    """Mean over tokens of KL(dense ‖ one sublayer truncated at the probe rank) by sublayer."""
    metric = _metric(study, INPUTS, GRADIENTS)
    dense = study.dense_log_probabilities
    found = {}
    for s in study.sublayers:
        probe = max(int(PROBE * s.break_even), 1)
        with study.with_weights({s.name: metric.truncated(s, probe)}):
            other = study.log_probabilities(study.windows)
        found[s.name] = float((dense.exp() * (dense - other)).sum(-1).double().mean())
    return found


@dataclass
class _Decomposed:
    parts: tuple[Tensor, Tensor, Tensor]
    left: Tensor
    right: Tensor


class Kfac:
    """min tr(H Δ G Δᵀ) by sublayer: H = L_H L_Hᵀ, G = L_G L_Gᵀ, the SVD of L_Hᵀ W L_G truncated.

    H is the mean over tokens of g gᵀ, g the gradient at the sublayer's output, and G that of x xᵀ.
    """

    def __init__(self, study: Study, inputs: float, gradients: float) -> None:
        self._study = study
        self._of: dict[str, _Decomposed] = {}
        for s in study.sublayers:
            x, g = study.inputs[s.name], study.output_gradients[s.name]
            left = cholesky(shrunk(g.T @ g / len(g), gradients))
            right = cholesky(shrunk(x.T @ x / len(x), inputs))
            self._of[s.name] = _Decomposed(svd(left.T @ s.weight @ right), left, right)
        self.tails = {name: tails(found.parts[1]) for name, found in self._of.items()}

    def truncated(self, s: Sublayer, rank: int) -> Tensor:
        """W′ of a rank."""
        found = self._of[s.name]
        return inverse(found.left).T @ head(found.parts, rank) @ inverse(found.right)

    def weights(self, ranks: Ranks) -> Weights:
        """W′ of all sublayers that are truncated."""
        return {
            s.name: self.truncated(s, rank)
            for s in self._study.sublayers
            if (rank := ranks[s.name]) is not None
        }
