"""HiSVD: capacity-anchored baseline, then redundancy-aware refinement per cluster (ACL 2026).

Stage 1 gives each sublayer the rank ``r = clip(λ·d^α·k*)``, where d is its rank density. Stage 2
multiplies the ranks of each cluster by a factor that increases with the mean energy share of the
components that stage 1 drops, and rescales to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from hisvd_cli.allocation.budget import Budget, break_even, full_rank
from hisvd_cli.allocation.methods import ALLOCATORS, WEIGHT_SPECTRA, Allocation, Options
from hisvd_cli.allocation.spectrum import Spectrum, mean_over_matrices, rank_density, tail_share
from hisvd_cli.modeling.layers.shapes import Shape

_TINY_DENSITY = 1e-6  # keeps λ finite for all-zero matrices

MODULATIONS: dict[str, Callable[[float, float], float]] = {
    "logarithmic": lambda z, beta: 1 + beta * math.log1p(z),
    "linear": lambda z, beta: 1 + beta * z,
    "power": lambda z, beta: math.pow(1 + z, beta),
    "exponential": lambda z, beta: math.exp(beta * z),
}
"""name → f(z, β), with f(0, β) = 1 and f increasing in z."""


class HisvdOptions(Options):
    """Options of ``hisvd``. The stage-2 factor of cluster c is f(weight·T_c, β)."""

    rank_method: Literal["stable", "effective", "mathematical"] = Field(
        "stable", description="rank measure of stage 1: stable, effective or mathematical."
    )
    alpha: float = Field(0.5, description="exponent of the rank density in stage 1.", ge=0, le=8)
    spectrum: Literal["whitened", "weight"] = Field(
        "weight", description="spectrum used by stage 1: whitened or weight."
    )
    modulation: Literal["logarithmic", "power", "exponential", "linear"] = Field(
        "logarithmic",
        description="form of the stage 2 factor: logarithmic, power, exponential or linear.",
    )
    lwe_strength: float = Field(
        2.0, description="strength β of stage 2; 0 disables stage 2.", ge=0, le=100
    )
    tail_redundancy_weight: float = Field(
        30.0, description="weight of the tail share in stage 2.", ge=0, le=100
    )


def _needs(options: HisvdOptions) -> set[str]:
    return {WEIGHT_SPECTRA} if options.spectrum == "weight" else set()


@ALLOCATORS.register("hisvd", needs=_needs, options=HisvdOptions)
def hisvd(spectra: Sequence[Spectrum], budget: Budget, *, options: HisvdOptions) -> Allocation:
    """Return ranks allocated in two stages.

    Args:
        spectra: one per sublayer.
        budget: the parameter budget.
        options: see :class:`HisvdOptions`.
    """
    measured = [s.energy if options.spectrum == "whitened" else s.of_weight for s in spectra]
    densities = [
        rank_density(energy, s.shape, options.rank_method)
        for energy, s in zip(measured, spectra, strict=True)
    ]
    energies = [s.energy for s in spectra]
    first = budget.scaled(
        [
            max(density, _TINY_DENSITY) ** options.alpha * break_even(s.shape)
            for density, s in zip(densities, spectra, strict=True)
        ]
    )
    baselines = budget.rounded(first, energies)
    tails = cluster_tails(spectra, baselines)
    modulation = MODULATIONS[options.modulation]
    factors = {
        cluster: modulation(options.tail_redundancy_weight * tail, options.lwe_strength)
        for cluster, tail in tails.items()
    }
    second = budget.scaled(
        [rank * factors[s.cluster] for rank, s in zip(first, spectra, strict=True)]
    )
    ranks = budget.rounded(second, energies)
    return Allocation(ranks, baselines, densities, tails, factors)


def cluster_tails(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> dict[str, float]:
    """Return cluster → T_c, the mean tail share of the cluster's truncated sublayers; 0 if all its
    sublayers stay dense."""
    shares: dict[str, list[tuple[float, Shape]]] = {s.cluster: [] for s in spectra}
    for s, rank in zip(spectra, ranks, strict=True):
        if rank < full_rank(s.shape):
            shares[s.cluster].append((tail_share(s.energy, rank), s.shape))
    return {cluster: mean_over_matrices(own) if own else 0.0 for cluster, own in shares.items()}
