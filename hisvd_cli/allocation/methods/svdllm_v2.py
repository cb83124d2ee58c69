"""Ratios by theoretical truncation loss per type (SVD-LLM V2, Wang et al. 2025, section 3).

The loss of a sublayer is ``L = ‖W X − W′ X‖_F`` for its best truncation at the uniform ratio. In
each type, the share *removed* is proportional to 1 / log L, and its mean is that of the budget. L
of a stack is the root mean square over its experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hisvd_cli.allocation.budget import Budget, break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.spectrum import Spectrum, mean_over_matrices
from hisvd_cli.modeling.layers.shapes import copies, numel

_LEAST_LOSS = math.e
"""Lower bound of losses: the logarithm of 1 is 0."""


@ALLOCATORS.register("svdllm-v2", needs={"moments"})
def svdllm_v2(spectra: Sequence[Spectrum], budget: Budget, *, tokens: int) -> Allocation:
    """Return ranks by the ratios kept within each type, scaled to the budget.

    Args:
        spectra: one per sublayer.
        budget: the parameter budget.
        tokens: calibration tokens; the paper's loss is a sum over tokens, energies are means.
    """
    uniform = budget.scaled([break_even(s.shape) for s in spectra])
    removed = 1 - budget.parameters / sum(map(numel, budget.shapes))
    wanted = [0.0] * len(spectra)
    for cluster in dict.fromkeys(s.cluster for s in spectra):
        mine = [i for i, s in enumerate(spectra) if s.cluster == cluster]
        scores = [_score(spectra[i], int(uniform[i]), tokens) for i in mine]
        mean = mean_over_matrices(zip(scores, (spectra[i].shape for i in mine), strict=True))
        for i, score in zip(mine, scores, strict=True):
            kept = 1 - removed * score / mean
            wanted[i] = max(kept * break_even(spectra[i].shape), 1.0)
    ranks = budget.rounded(budget.scaled(wanted), [s.energy for s in spectra], nearest=True)
    return Allocation(ranks, [int(rank) for rank in uniform])


def _score(spectrum: Spectrum, rank: int, tokens: int) -> float:
    each = float(spectrum.energy[rank:].sum()) / copies(spectrum.shape)
    loss = math.sqrt(tokens * each)
    return 1 / math.log(max(loss, _LEAST_LOSS))
