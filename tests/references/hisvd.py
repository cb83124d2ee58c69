"""HiSVD, as design.md section 3 has it: two stages, whitened truncation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.references.common import Ranks, Study, Sublayer, Weights, bisect, fill, snapped, tails

ALPHA = 0.5
STRENGTH = 2.0
WEIGHT = 30.0
FLOOR = 0.3


def hisvd(study: Study, ratio: float) -> Weights:
    """HiSVD (ACL 2026): stable rank of the weights, then one factor per type by tail energy.

    Stage 1: r = λ·d^0.5·k*, d the stable rank Σσ²/σ₁² of W over its full rank, at least 0.3 of the
    uniform rank. Stage 2: the tail share of the whitened energy at that rank, averaged over the
    truncated sublayers of a type to T, gives the factor 1 + 2·log(1 + 30·T); the ranks are
    multiplied by it and scaled back to the budget.
    """
    budget = study.budget(ratio)
    energies = {s.name: tails(study.whitened[s.name][1]) for s in study.sublayers}
    first = {s.name: math.sqrt(_density(s.weight)) * s.break_even for s in study.sublayers}
    baseline = _scaled(study, first, ratio, budget)
    # Whole ranks that spend the budget, as in a plan. With ranks that are only rounded down, v_proj
    # of the demo is not dense here at keep 0.8, gets more ranks in the end, and perplexity is 10 %
    # lower (96 × 128 tokens: 21.9 instead of 24.0).
    rounded = {s.name: snapped(s, baseline[s.name]) for s in study.sublayers}
    whole = fill(study, rounded, energies, budget)
    second: dict[str, float] = {}
    for members in study.by_kind().values():
        shares = [
            energies[s.name][rank] / energies[s.name][0]
            for s in members
            if (rank := whole[s.name]) is not None
        ]
        mean = sum(shares) / len(shares) if shares else 0.0
        factor = 1 + STRENGTH * math.log(1 + WEIGHT * mean)
        second |= {s.name: factor * baseline[s.name] for s in members}
    final = _scaled(study, second, ratio, budget)
    ranks: Ranks = {s.name: snapped(s, final[s.name]) for s in study.sublayers}
    return study.whitened_weights(fill(study, ranks, energies, budget))


def _density(weight: Tensor) -> float:
    sigma = torch.linalg.svdvals(weight)
    return float((sigma**2).sum() / sigma[0] ** 2) / len(sigma)


def _scaled(study: Study, ranks: dict[str, float], ratio: float, budget: int) -> dict[str, float]:
    """Multiply all ranks by the one λ that meets the budget, between floor and break-even."""

    def at(s: Sublayer, scale: float) -> float:
        return min(max(scale * ranks[s.name], FLOOR * ratio * s.break_even), s.break_even)

    scale = bisect(lambda x: sum(at(s, x) * s.rank_cost for s in study.sublayers), budget)
    return {s.name: at(s, scale) for s in study.sublayers}
