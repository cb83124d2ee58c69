"""Truncation positions learned by gradient (the idea of Dobi-SVD, Qinsi Wang et al. 2025).

Every sublayer's components are masked softly at a real-valued position; the divergence from the
dense model falls by gradient steps on the positions, which are projected to the budget after each.
More rank lowers the divergence everywhere, so a step is taken along the budget: from the gradient
goes the part that would only spend more, or Adam, which makes all steps alike in size, would see
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hisvd_cli.allocation.budget import Budget, break_even, full_rank, rank_of_share
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Probe
from hisvd_cli.allocation.methods.waterfill import optimal_ranks
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.layers.lowrank import Storage
from hisvd_cli.modeling.sublayers import Shape
from hisvd_cli.utils.errors import NumericalError

_BETAS = (0.9, 0.99)
_TINY = 1e-12


@ALLOCATORS.register("learned", needs={"moments"})
def learned(
    spectra: Sequence[Spectrum],
    budget: Budget,
    *,
    probe: Probe,
    learning_start: str,
    learning_steps: int,
    learning_rate: float,
    softness: float,
) -> Allocation:
    """Learn a position per sublayer, starting from the same share everywhere or from ``waterfill``.

    Steps are Adam's (Kingma and Ba 2015). A sublayer whose position reaches break-even is dense,
    where nothing is measured; only the projection brings it down again. The last step counts, not
    the one of least divergence: steps see different text.

    Args:
        spectra: one per sublayer.
        budget: what they may keep.
        probe: gives the divergence and its gradient.
        learning_start: ``uniform``, or ``waterfill``.
        learning_steps: how many.
        learning_rate: size of a step, as a share of the full rank.
        softness: width of the masks, as a share of the full rank.

    Raises:
        NumericalError: a divergence, or its gradient, is not finite.
    """
    energies = [s.energy for s in spectra]
    limits = [break_even(s.shape) for s in spectra]
    strides = [
        learning_rate * full_rank(s.shape) / limit for s, limit in zip(spectra, limits, strict=True)
    ]
    if learning_start == "uniform":
        start = budget.rounded(budget.scaled(limits), energies, nearest=True)
    else:
        start = optimal_ranks(budget, energies)
    shares = budget.shares(start)
    adam = _Adam(len(shares))
    for step in range(learning_steps):
        slopes = _slopes(probe, shares, budget, softness, step)
        directions = adam.direction(_along_budget(slopes, shares, budget))
        moved = [x - a * d for x, a, d in zip(shares, strides, directions, strict=True)]
        shares = _projected(moved, budget)
    learned_ranks = [share * limit for share, limit in zip(shares, limits, strict=True)]
    return Allocation(budget.rounded(learned_ranks, energies, nearest=True), start)


def _slopes(
    probe: Probe, shares: Sequence[float], budget: Budget, softness: float, step: int
) -> list[float]:
    """Return the gradient of the divergence by each share of mn."""
    places = [_place(x, s, budget.storage) for x, s in zip(shares, budget.shapes, strict=True)]
    loss, gradient = probe.soft_divergence([rank for rank, _ in places], softness, step)
    if not all(map(math.isfinite, [loss, *gradient])):
        raise NumericalError(
            f"The divergence of step {step + 1}, or its gradient, is NaN or infinite.",
            "Use --dtype float32, or another --allocator.",
        )
    return [g * slope for g, (_, slope) in zip(gradient, places, strict=True)]


def _place(share: float, shape: Shape, storage: Storage) -> tuple[float, float]:
    """Return the position that a share of mn pays for, and how fast it moves with the share."""
    if share >= 1:
        return math.inf, 0.0
    m, n = shape
    rank = rank_of_share(share, shape, storage)
    return rank, m * n / (m + n - (2 * rank if storage == "pivoted" else 0))


def _along_budget(slopes: Sequence[float], shares: Sequence[float], budget: Budget) -> list[float]:
    """Return the slopes without their part along the sizes; 0 for what cannot move that way.

    A share at its floor that would fall counts no more, or it would pull on the others for ever.
    """
    sizes, floors = _sizes(budget), budget.shares(budget.floors)
    free = [i for i, share in enumerate(shares) if share < 1]
    while True:
        price = sum(slopes[i] * sizes[i] for i in free) / max(sum(sizes[i] ** 2 for i in free), 1)
        along = {i: slopes[i] - price * sizes[i] for i in free}
        kept = [i for i in free if along[i] <= 0 or shares[i] > floors[i]]
        if kept == free:
            return [along.get(i, 0.0) for i in range(len(shares))]
        free = kept


class _Adam:
    """Running means of the gradient and its square, corrected for their start."""

    def __init__(self, count: int) -> None:
        self._mean = [0.0] * count
        self._square = [0.0] * count
        self._steps = 0

    def direction(self, gradient: Sequence[float]) -> list[float]:
        """Return the step of size one for the next gradient."""
        self._steps += 1
        first, second = _BETAS
        self._mean = [
            first * m + (1 - first) * g for m, g in zip(self._mean, gradient, strict=True)
        ]
        self._square = [
            second * s + (1 - second) * g * g for s, g in zip(self._square, gradient, strict=True)
        ]
        short, long = 1 - first**self._steps, 1 - second**self._steps
        return [
            (m / short) / (math.sqrt(s / long) + _TINY)
            for m, s in zip(self._mean, self._square, strict=True)
        ]


def _projected(shares: Sequence[float], budget: Budget) -> list[float]:
    """Return the nearest shares of mn, between floor and 1, whose cost is the budget.

    A share's cost is proportional to it, with mn: the nearest point subtracts a multiple of mn.
    """
    sizes, floors = _sizes(budget), budget.shares(budget.floors)
    largest = max(sizes)

    def at(shift: float) -> list[float]:
        return [
            min(max(share - shift * size / largest, floor), 1.0)
            for share, size, floor in zip(shares, sizes, floors, strict=True)
        ]

    span = (max(map(abs, shares)) + 1) * largest / min(sizes)  # moves any share to either end
    low, high = -span, span
    for _ in range(100):
        middle = (low + high) / 2
        spent = sum(share * size for share, size in zip(at(middle), sizes, strict=True))
        low, high = (middle, high) if spent > budget.parameters else (low, middle)
    return at(high)


def _sizes(budget: Budget) -> list[int]:
    return [m * n for m, n in budget.shapes]
