"""Sensitivity-based rank search (ASVD, Yuan et al. 2023, section 3.3).

The perplexity is measured with each sublayer alone truncated to each of a grid of shares. Of all
(sublayer, share) pairs, sorted by perplexity, those up to a threshold are allowed, and a sublayer
gets the smallest share that is allowed to it; the threshold is found by binary search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hisvd_cli.allocation.budget import Budget, break_even, full_rank, rank_of_share
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Probe
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.utils.errors import NumericalError


@ALLOCATORS.register("asvd", needs={"moments"})
def asvd(
    spectra: Sequence[Spectrum],
    budget: Budget,
    *,
    probe: Probe,
    sensitivity_ratios: Sequence[float],
) -> Allocation:
    """Allocate the smallest shares that measured perplexity allows.

    Args:
        spectra: one per sublayer.
        budget: what they may keep.
        probe: measures perplexities.
        sensitivity_ratios: the grid of kept shares, each above 0 and at most 1.

    Raises:
        NumericalError: a perplexity is NaN.
    """
    pairs: list[tuple[float, int, int]] = []
    for i, s in enumerate(spectra):
        kept = [int(rank_of_share(r, s.shape, budget.storage)) for r in sensitivity_ratios]
        ranks = {max(rank, budget.floors[i]) for rank in kept}
        pairs += [(_measured(probe, s.name, rank), i, rank) for rank in sorted(ranks)]
    pairs.sort()
    low, high = 0, len(pairs)  # with no pair allowed all stay dense; all pairs cost least
    while low < high:
        middle = (low + high) // 2
        spent = budget.spent(_smallest(pairs[:middle], budget))
        low, high = (low, middle) if spent <= budget.parameters else (middle + 1, high)
    chosen = _smallest(pairs[:low], budget)
    energies = [s.energy for s in spectra]
    if budget.spent(chosen) <= budget.parameters:
        return Allocation(budget.settled(chosen, energies), chosen)
    # A grid whose smallest shares are above the budget's: what it asks for is scaled down.
    shares = zip(budget.shares(chosen), budget.shapes, strict=True)
    real = [share * break_even(shape) for share, shape in shares]
    return Allocation(budget.rounded(budget.scaled(real), energies), chosen)


def _measured(probe: Probe, name: str, rank: int) -> float:
    perplexity = probe.perplexity(name, rank)
    if math.isnan(perplexity):
        raise NumericalError(
            f"The perplexity with {name} truncated to rank {rank} is NaN.",
            "Use --dtype float32, or another --allocator.",
        )
    return perplexity


def _smallest(pairs: Sequence[tuple[float, int, int]], budget: Budget) -> list[int]:
    ranks = [full_rank(shape) for shape in budget.shapes]
    for _, i, rank in pairs:
        ranks[i] = min(ranks[i], rank)
    return ranks
