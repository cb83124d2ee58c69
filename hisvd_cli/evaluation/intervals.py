"""Bootstrap confidence intervals of ratios of sums, for single models and for paired differences.

Every figure of an evaluation is a sum over tokens divided by a count (tokens, bytes). Whole windows
are resampled with replacement, or blocks of tokens if there are few windows. Single tokens would
give intervals that are too narrow, since neighbouring tokens are correlated. Intervals are
percentile intervals (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13).
All models use the same resamples, so that differences between models are paired: the difficulty of
the text, common to both, cancels.

Legend: W windows, K blocks of tokens in each, n units, D resamples.
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
"""Tokens per block."""
FEWEST_UNITS = 8
"""Fewer units give no interval, since their percentiles say nothing about the tails."""
FEWEST_WINDOWS = 32
"""Whole windows are resampled if there are at least this many."""


def block_sums(values: Tensor) -> Tensor:
    """Return the sums ``[B, K]`` of values ``[B, T]`` over blocks of ``BLOCK`` tokens (the last one
    may be shorter), in float64."""
    short = -values.shape[1] % BLOCK
    padded = torch.nn.functional.pad(values.double(), (0, short))
    return padded.view(len(values), -1, BLOCK).sum(-1)


def draws_windows(sums: Tensor) -> bool:
    """Return whether whole windows of ``[W, K]`` are resampled instead of blocks."""
    return sums.shape[0] >= FEWEST_WINDOWS


def units(sums: Tensor) -> Tensor:
    """Return the sums ``[n]`` of the units to resample from ``[W, K]``."""
    return sums.sum(1) if draws_windows(sums) else sums.flatten()


@lru_cache(maxsize=2)
def draw_counts(count: int) -> Tensor:
    """Return how often each of ``count`` units occurs in each resample: ``[D, count]``, int16."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(count, (DRAWS, count), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.int16)
    return torch.zeros(DRAWS, count, dtype=torch.int16).scatter_add_(1, drawn, ones)


def resampled(numerator: Tensor, denominator: Tensor) -> Tensor | None:
    """Return Σ numerator / Σ denominator of each resample ``[D]``; None for too few units.

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
    """Return the central ``LEVEL`` of resamples ``[D]``; None without any, or if not finite."""
    if draws is None or not bool(draws.isfinite().all()):
        return None
    outside = (1 - LEVEL) / 2
    low, high = draws.quantile(torch.tensor([outside, 1 - outside], dtype=draws.dtype)).tolist()
    return low, high
