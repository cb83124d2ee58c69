"""HiSVD: capacity-anchored baseline, then redundancy-aware refinement per cluster (ACL 2026).

Stage 1 gives each sublayer ``r = clip(λ·d^α·k*)`` with d its rank density. Stage 2 multiplies the
baselines of each cluster by one factor that rises with the mean energy share of what stage 1 would
cut off, and rescales to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from hisvd_cli.allocation.budget import Budget, break_even, full_rank
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.spectrum import Spectrum, rank_density, tail_share
from hisvd_cli.utils.errors import UsageError, suggest

_TINY_DENSITY = 1e-6  # an all-zero matrix still gets a positive weight, so that λ stays finite

MODULATIONS: dict[str, Callable[[float, float], float]] = {
    "logarithmic": lambda z, beta: 1 + beta * math.log1p(z),
    "linear": lambda z, beta: 1 + beta * z,
    "power": lambda z, beta: math.pow(1 + z, beta),
    "exponential": lambda z, beta: math.exp(beta * z),
}
"""name → f(z, β), each 1 at z = 0 and rising with z."""


@ALLOCATORS.register("hisvd")
def hisvd(
    spectra: Sequence[Spectrum],
    budget: Budget,
    *,
    rank_method: str,
    alpha: float,
    modulation: str,
    lwe_strength: float,
    tail_redundancy_weight: float,
    spectrum: str,
) -> Allocation:
    """Allocate ranks in two stages.

    Args:
        spectra: one per sublayer.
        budget: what they may keep.
        rank_method: rank measure of stage 1: stable, effective or mathematical.
        alpha: exponent α of the density.
        modulation: form of the stage-2 factor.
        lwe_strength: β of the factor; 0 leaves stage 1 as it is.
        tail_redundancy_weight: weight of T_c in ``z = weight·T_c``.
        spectrum: which spectrum stage 1 measures, ``whitened`` or ``weight``.

    Raises:
        UsageError: an unknown rank method or modulation.
    """
    if modulation not in MODULATIONS:
        raise UsageError(f"No modulation '{modulation}'.", suggest(modulation, MODULATIONS))
    measured = [s.energy if spectrum == "whitened" else s.of_weight for s in spectra]
    densities = [
        rank_density(energy, s.shape, rank_method)
        for energy, s in zip(measured, spectra, strict=True)
    ]
    energies = [s.energy for s in spectra]
    first = budget.scaled(
        [
            max(density, _TINY_DENSITY) ** alpha * break_even(s.shape)
            for density, s in zip(densities, spectra, strict=True)
        ]
    )
    baselines = budget.rounded(first, energies)
    tails = cluster_tails(spectra, baselines)
    factors = {
        cluster: MODULATIONS[modulation](tail_redundancy_weight * tail, lwe_strength)
        for cluster, tail in tails.items()
    }
    second = budget.scaled(
        [rank * factors[s.cluster] for rank, s in zip(first, spectra, strict=True)]
    )
    ranks = budget.rounded(second, energies)
    return Allocation(ranks, baselines, densities, tails, factors)


def cluster_tails(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> dict[str, float]:
    """Return cluster → T_c, the mean tail share over the cluster's truncated sublayers.

    A cluster in which every sublayer stays dense has T_c = 0.
    """
    shares: dict[str, list[float]] = {s.cluster: [] for s in spectra}
    for s, rank in zip(spectra, ranks, strict=True):
        if rank < full_rank(s.shape):
            shares[s.cluster].append(tail_share(s.energy, rank))
    return {cluster: fmean(values) if values else 0.0 for cluster, values in shares.items()}
