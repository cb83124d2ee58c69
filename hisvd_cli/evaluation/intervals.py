"""How sure a figure is: bootstrap intervals of ratios of sums, alone and in pairs.

Every figure of an evaluation is a sum over tokens divided by a count (tokens, bytes). What is drawn
again, with replacement, are whole windows, or blocks of tokens within windows where windows are
few; neighbouring tokens depend on each other, and single ones would give intervals too narrow. The
interval is that of the percentiles (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*,
chapter 13). All models draw the same units, so that a difference between two is paired: what makes
a text easy or hard for both drops out.

Legend: W windows, K blocks of tokens in each, n units, D draws.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Interval = tuple[float, float]

LEVEL = 0.95
DRAWS = 2000
SEED = 0
BLOCK = 128
"""Tokens of a block."""
FEWEST_UNITS = 8
"""With fewer, no interval is given: percentiles of so few tell nothing of the tails."""
FEWEST_WINDOWS = 32
"""From this number on, whole windows are drawn."""


def block_sums(values: Tensor) -> Tensor:
    """Sum values of tokens ``[B, T]`` over blocks of ``BLOCK``, the last one shorter: ``[B, K]``,
    in float64."""
    short = -values.shape[1] % BLOCK
    padded = torch.nn.functional.pad(values.double(), (0, short))
    return padded.view(len(values), -1, BLOCK).sum(-1)


def draws_windows(sums: Tensor) -> bool:
    """Tell whether whole windows of ``[W, K]`` are drawn, and not blocks."""
    return sums.shape[0] >= FEWEST_WINDOWS


def units(sums: Tensor) -> Tensor:
    """Return the sums ``[n]`` of what is drawn from ``[W, K]``."""
    return sums.sum(1) if draws_windows(sums) else sums.flatten()


@lru_cache(maxsize=2)
def draw_counts(count: int) -> Tensor:
    """Return how often each of ``count`` units is in each draw: ``[D, count]``, int16."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(count, (DRAWS, count), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.int16)
    return torch.zeros(DRAWS, count, dtype=torch.int16).scatter_add_(1, drawn, ones)


def resampled(numerator: Tensor, denominator: Tensor) -> Tensor | None:
    """Return Σ numerator / Σ denominator of each draw ``[D]``; None for too few units.

    Args:
        numerator: sums ``[W, K]``.
        denominator: counts ``[W, K]``.
    """
    above, below = units(numerator), units(denominator)
    if len(above) < FEWEST_UNITS:
        return None
    counts = draw_counts(len(above)).double()
    return (counts @ above) / (counts @ below.double())


def interval(draws: Tensor | None) -> Interval | None:
    """Return the middle ``LEVEL`` of draws ``[D]``; None where there are none, or not finite."""
    if draws is None or not bool(draws.isfinite().all()):
        return None
    outside = (1 - LEVEL) / 2
    low, high = draws.quantile(torch.tensor([outside, 1 - outside], dtype=draws.dtype)).tolist()
    return low, high
