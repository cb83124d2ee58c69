"""The same keep ratio for every sublayer (SVD-LLM, Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from hisvd_cli.allocation.budget import Budget, break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.spectrum import Spectrum


@ALLOCATORS.register("uniform")
def uniform(spectra: Sequence[Spectrum], budget: Budget) -> Allocation:
    """Return ``r = ρ·k*`` for each sublayer, rounded within the budget."""
    real = budget.scaled([break_even(s.shape) for s in spectra])
    ranks = budget.rounded(real, [s.energy for s in spectra], nearest=True)
    return Allocation(ranks, list(ranks))
