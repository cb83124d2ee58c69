"""Sensitivity-based rank search (ASVD, Yuan et al. 2023, section 3.3).

Perplexity is measured for every sublayer and keep ratio of a grid, with only that sublayer
truncated. A threshold on the perplexity admits some (sublayer, ratio) pairs, and each sublayer gets
its smallest admitted ratio. Binary search finds the threshold that meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from hisvd_cli.allocation.budget import Budget, break_even, full_rank, rank_of_share
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Options, Probe, Ratios
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.utils.errors import NumericalError


class AsvdOptions(Options):
    """Options of ``asvd``."""

    sensitivity_ratios: Ratios = Field(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        description="keep ratios at which the sensitivity of each layer is measured.",
    )


@ALLOCATORS.register("asvd", needs={"moments"}, options=AsvdOptions)
def asvd(
    spectra: Sequence[Spectrum], budget: Budget, *, probe: Probe, options: AsvdOptions
) -> Allocation:
    """Return the smallest ranks that a threshold on the measured perplexity admits.

    Args:
        spectra: one per sublayer.
        budget: the parameter budget.
        probe: measures perplexities.
        options: see :class:`AsvdOptions`.

    Raises:
        NumericalError: a perplexity is NaN.
    """
    pairs: list[tuple[float, int, int]] = []
    for i, s in enumerate(spectra):
        kept = [int(rank_of_share(r, s.shape, budget.storage)) for r in options.sensitivity_ratios]
        ranks = {max(rank, budget.floors[i]) for rank in kept}
        pairs += [(_measured(probe, s.name, rank), i, rank) for rank in sorted(ranks)]
    pairs.sort()
    low, high = 0, len(pairs)  # admitting no pair leaves all dense, admitting all costs least
    while low < high:
        middle = (low + high) // 2
        spent = budget.spent(_smallest(pairs[:middle], budget))
        low, high = (low, middle) if spent <= budget.parameters else (middle + 1, high)
    chosen = _smallest(pairs[:low], budget)
    energies = [s.energy for s in spectra]
    if budget.spent(chosen) <= budget.parameters:
        return Allocation(budget.settled(chosen, energies), chosen)
    # The smallest ratios of the grid exceed the budget: scale the ranks down.
    shares = zip(budget.shares(chosen), budget.shapes, strict=True)
    real = [share * break_even(shape) for share, shape in shares]
    return Allocation(budget.rounded(budget.scaled(real), energies), chosen)


def _measured(probe: Probe, name: str, rank: int) -> float:
    perplexity = probe.perplexity(name, rank)
    if math.isnan(perplexity):
        raise NumericalError(
            f"The perplexity with {name} truncated to rank {rank} is NaN.",
            "Use `model.dtype` float32, or another `plan.allocator`.",
        )
    return perplexity


def _smallest(pairs: Sequence[tuple[float, int, int]], budget: Budget) -> list[int]:
    ranks = [full_rank(shape) for shape in budget.shapes]
    for _, i, rank in pairs:
        ranks[i] = min(ranks[i], rank)
    return ranks
