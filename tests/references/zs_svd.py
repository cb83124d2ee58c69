"""ZS-SVD: components dropped so that predicted changes of the loss cancel."""

from __future__ import annotations

import torch

from tests.references.common import Ranks, Study, Weights


def zs_svd(study: Study, ratio: float) -> Weights:
    """Zero Sum SVD (arXiv 2602.02848), without its correction step and its quantised store.

    Dropping component i of W S changes the loss by δ_i = −σ_i u_iᵀ (∂L/∂W · S⁻ᵀ) v_i, to first
    order. Each sublayer offers its smallest remaining component. While the changes so far sum to
    at most 0, the positive δ nearest to 0 goes next, else the negative one; where that sign has
    none, the other. A sublayer saves nothing until its rank falls below break-even; one that stays
    at or above it is left dense. At least rank 1 stays.
    """
    changes = {s.name: _changes(study, s.name) for s in study.sublayers}
    ranks = {s.name: min(s.shape) for s in study.sublayers}
    surplus = sum(s.dense_cost for s in study.sublayers) - study.budget(ratio)
    total = 0.0
    while surplus > 0:
        offers = [
            (changes[s.name][ranks[s.name] - 1], s) for s in study.sublayers if ranks[s.name] > 1
        ]
        wanted = [o for o in offers if (o[0] >= 0) == (total <= 0)] or offers
        change, s = min(wanted, key=lambda offer: abs(offer[0]))
        before = min(s.cost(ranks[s.name]), s.dense_cost)
        ranks[s.name] -= 1
        surplus -= before - min(s.cost(ranks[s.name]), s.dense_cost)
        total += change
    chosen: Ranks = {
        s.name: ranks[s.name] if ranks[s.name] <= s.top_rank else None for s in study.sublayers
    }
    return study.whitened_weights(chosen)


def _changes(study: Study, name: str) -> list[float]:
    u, sigma, v = study.whitened[name]
    gradient = study.weight_gradients[name].mean(0)
    whitened = torch.linalg.solve_triangular(
        study.cholesky_of_inputs[name], gradient.T, upper=False
    ).T
    values: list[float] = (-sigma * ((u.T @ whitened) * v).sum(1)).tolist()
    return values
