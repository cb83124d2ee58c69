"""Shares by how compressible a sublayer is, and how much its block does (Swift-SVD, 2026).

Within each type, half of the uniform rank is certain, and the rest is shared in proportion to
``I^w · c^(1−w)``: c is the effective rank over the full rank, I the angular distance of the block's
input and output, stretched to 1 … 2 over the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hisvd_cli.allocation.budget import Budget, break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.spectrum import Spectrum, rank_density
from hisvd_cli.linalg.statistics import missing

_CERTAIN = 0.5
_LEAST = 1e-6  # of a score: an all-zero matrix has effective rank 0


@ALLOCATORS.register("swift", needs={"moments"})
def swift(spectra: Sequence[Spectrum], budget: Budget, *, importance_weight: float) -> Allocation:
    """Allocate ranks by effective rank and importance.

    Args:
        spectra: one per sublayer, with the importance of their blocks.
        budget: what they may keep.
        importance_weight: w, from 0 (effective rank alone) to 1 (importance alone).

    Raises:
        SourceError: nothing is known of the blocks' importance.
    """
    importance = _stretched(spectra)
    densities = [rank_density(s.energy, s.shape, "effective") for s in spectra]
    scores = [
        max(i**importance_weight * d ** (1 - importance_weight), _LEAST)
        for i, d in zip(importance, densities, strict=True)
    ]
    uniform = budget.scaled([break_even(s.shape) for s in spectra])
    wanted = [0.0] * len(spectra)
    for cluster in dict.fromkeys(s.cluster for s in spectra):
        mine = [i for i, s in enumerate(spectra) if s.cluster == cluster]
        mean = fmean(scores[i] for i in mine)
        for i in mine:
            wanted[i] = uniform[i] * (_CERTAIN + (1 - _CERTAIN) * scores[i] / mean)
    ranks = budget.rounded(budget.scaled(wanted), [s.energy for s in spectra], nearest=True)
    return Allocation(ranks, [int(rank) for rank in uniform], densities)


def _stretched(spectra: Sequence[Spectrum]) -> list[float]:
    angles = [s.importance for s in spectra if s.importance is not None]
    if len(angles) < len(spectra):
        raise missing("swift", "moments")
    least, most = min(angles), max(angles)
    return [1 + (angle - least) / (most - least) if most > least else 1.0 for angle in angles]
