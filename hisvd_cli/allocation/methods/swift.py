"""Ranks by effective rank and block importance (Swift-SVD, 2026).

Within each type, every sublayer gets half of the uniform rank, and the rest is distributed in
proportion to ``I^w · c^(1−w)``: c is the effective rank over the full rank, I the angular distance
between the block's input and output, rescaled to 1 … 2 over the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from hisvd_cli.allocation.budget import Budget, break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Options
from hisvd_cli.allocation.spectrum import Spectrum, mean_over_matrices, rank_density
from hisvd_cli.linalg.statistics import missing

_FIXED_SHARE = 0.5
_LEAST_SCORE = 1e-6  # an all-zero matrix has effective rank 0


class SwiftOptions(Options):
    """Options of ``swift``."""

    importance_weight: float = Field(0.6, description="weight of block importance.", ge=0, le=1)


@ALLOCATORS.register("swift", needs={"moments"}, options=SwiftOptions)
def swift(spectra: Sequence[Spectrum], budget: Budget, *, options: SwiftOptions) -> Allocation:
    """Return ranks by effective rank and importance.

    Args:
        spectra: one per sublayer, with the importance of their blocks.
        budget: the parameter budget.
        options: see :class:`SwiftOptions`.

    Raises:
        SourceError: the importance of the blocks is unknown.
    """
    weight = options.importance_weight
    importance = _rescaled(spectra)
    densities = [rank_density(s.energy, s.shape, "effective") for s in spectra]
    scores = [
        max(i**weight * d ** (1 - weight), _LEAST_SCORE)
        for i, d in zip(importance, densities, strict=True)
    ]
    uniform = budget.scaled([break_even(s.shape) for s in spectra])
    wanted = [0.0] * len(spectra)
    for cluster in dict.fromkeys(s.cluster for s in spectra):
        mine = [i for i, s in enumerate(spectra) if s.cluster == cluster]
        mean = mean_over_matrices((scores[i], spectra[i].shape) for i in mine)
        for i in mine:
            wanted[i] = uniform[i] * (_FIXED_SHARE + (1 - _FIXED_SHARE) * scores[i] / mean)
    ranks = budget.rounded(budget.scaled(wanted), [s.energy for s in spectra], nearest=True)
    return Allocation(ranks, [int(rank) for rank in uniform], densities)


def _rescaled(spectra: Sequence[Spectrum]) -> list[float]:
    angles = [s.importance for s in spectra if s.importance is not None]
    if len(angles) < len(spectra):
        raise missing("swift", "moments")
    least, most = min(angles), max(angles)
    return [1 + (angle - least) / (most - least) if most > least else 1.0 for angle in angles]
