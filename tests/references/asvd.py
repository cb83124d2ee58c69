"""ASVD: inputs scaled by their size, shares by measured perplexity."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.references.common import Ranks, Study, Sublayer, Weights, head, snapped, svd

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ALPHA = 0.5
WINDOWS = 4
"""Windows to measure on: the first ones of the calibration."""


def asvd(study: Study, ratio: float) -> Weights:
    """ASVD (arXiv 2312.05821): absolute mean, α 0.5, sensitivity-based truncation rank searching.

    Each pair of sublayer and kept share on the grid has a perplexity. In the list sorted from
    worst to best, a point is searched by bisection from which on all pairs apply (of several of
    one sublayer, the smallest share) and the ratio is met.
    """
    listed = sorted(_sensitivity(study), key=lambda entry: -entry[0])
    low, high = 0, len(listed) - 1
    while low < high:
        middle = (low + high) // 2
        if _kept(study, _shares(study, listed[middle:])) > ratio:
            high = middle
        else:
            low = middle + 1
    # The bisection stops at the first point that keeps too much; the one before it does not.
    met = low if _kept(study, _shares(study, listed[low:])) <= ratio else low - 1
    shares = _shares(study, listed[met:])
    ranks: Ranks = {s.name: snapped(s, shares[s.name] * s.break_even) for s in study.sublayers}
    return {
        s.name: _scaled(study, s, rank)
        for s in study.sublayers
        if (rank := ranks[s.name]) is not None
    }


def _shares(study: Study, entries: list[tuple[float, str, float]]) -> dict[str, float]:
    shares = {s.name: 1.0 for s in study.sublayers}
    for _, name, share in entries:
        shares[name] = min(shares[name], share)
    return shares


def _kept(study: Study, shares: dict[str, float]) -> float:
    total = sum(s.dense_cost for s in study.sublayers)
    return sum(shares[s.name] * s.dense_cost for s in study.sublayers) / total


@cache
def _sensitivity(study: Study) -> tuple[tuple[float, str, float], ...]:
    """Perplexity, sublayer and share, for every sublayer truncated alone at every share."""
    windows = study.windows[:WINDOWS]
    return tuple(
        (
            study.perplexity(windows, {s.name: _scaled(study, s, int(share * s.break_even))}),
            s.name,
            share,
        )
        for s in study.sublayers
        for share in GRID
    )


def _scaled(study: Study, s: Sublayer, rank: int) -> Tensor:
    sizes, parts = _decomposed(study, s.name)
    return head(parts, rank) / sizes


@cache
def _decomposed(study: Study, name: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    weight = next(s.weight for s in study.sublayers if s.name == name)
    sizes = study.inputs[name].abs().mean(0) ** ALPHA
    sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    return sizes, svd(weight * sizes)
