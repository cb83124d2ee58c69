"""Truncation positions learned by gradient descent (after Dobi-SVD, Qinsi Wang et al. 2025).

The components of each sublayer are masked softly at a real-valued position. Gradient steps on the
positions reduce the divergence from the dense model; each step is followed by a projection to the
budget. The gradient is first projected along the budget, because more rank reduces the divergence
everywhere, and Adam would normalise all steps to that direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hisvd_cli.allocation.budget import Budget, break_even, full_rank, rank_of_share
from hisvd_cli.allocation.methods import ALLOCATORS, MANY, Allocation, Options, Probe
from hisvd_cli.allocation.methods.waterfill import optimal_ranks
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.layers.shapes import Shape, matrix_of, numel, storage_of
from hisvd_cli.utils.errors import NumericalError

if TYPE_CHECKING:
    from hisvd_cli.modeling.layers.lowrank import Storage

_BETAS = (0.9, 0.99)
_TINY = 1e-12


class LearnedOptions(Options):
    """Options of ``learned``."""

    learning_start: Literal["uniform", "waterfill"] = Field(
        "waterfill", description="initial truncation positions: uniform or waterfill."
    )
    learning_steps: int = Field(40, description="gradient descent steps.", ge=1, le=MANY)
    learning_rate: float = Field(
        0.01, description="step size, as a share of the full rank.", gt=0, le=1
    )
    softness: float = Field(
        0.02, description="width of the soft mask, as a share of the full rank.", gt=0, le=1
    )


@ALLOCATORS.register("learned", needs={"moments"}, options=LearnedOptions)
def learned(
    spectra: Sequence[Spectrum], budget: Budget, *, probe: Probe, options: LearnedOptions
) -> Allocation:
    """Return the ranks at learned positions, one per sublayer.

    Steps are those of Adam (Kingma and Ba 2015). A sublayer whose position reaches break-even is
    dense and has no gradient; only the projection can reduce its rank again. The result is the last
    step, not the one of least divergence, because steps use different text.

    Args:
        spectra: one per sublayer.
        budget: the parameter budget.
        probe: measures the divergence and its gradient.
        options: see :class:`LearnedOptions`.

    Raises:
        NumericalError: a divergence or its gradient is not finite.
    """
    energies = [s.energy for s in spectra]
    limits = [break_even(s.shape) for s in spectra]
    strides = [
        options.learning_rate * full_rank(s.shape) / limit
        for s, limit in zip(spectra, limits, strict=True)
    ]
    if options.learning_start == "uniform":
        start = budget.rounded(budget.scaled(limits), energies, nearest=True)
    else:
        start = optimal_ranks(budget, energies)
    shares = budget.shares(start)
    adam = _Adam(len(shares))
    for step in range(options.learning_steps):
        slopes = _slopes(probe, shares, budget, options.softness, step)
        directions = adam.direction(_along_budget(slopes, shares, budget))
        moved = [x - a * d for x, a, d in zip(shares, strides, directions, strict=True)]
        shares = _projected(moved, budget)
    learned_ranks = [share * limit for share, limit in zip(shares, limits, strict=True)]
    return Allocation(budget.rounded(learned_ranks, energies, nearest=True), start)


def _slopes(
    probe: Probe, shares: Sequence[float], budget: Budget, softness: float, step: int
) -> list[float]:
    """Return the gradient of the divergence with respect to each share of parameters."""
    places = [_place(x, s, budget.storage) for x, s in zip(shares, budget.shapes, strict=True)]
    loss, gradient = probe.soft_divergence([rank for rank, _ in places], softness, step)
    if not all(map(math.isfinite, [loss, *gradient])):
        raise NumericalError(
            f"The divergence of step {step + 1} or its gradient is NaN or infinite.",
            "Use `model.dtype` float32, or another `plan.allocator`.",
        )
    return [g * slope for g, (_, slope) in zip(gradient, places, strict=True)]


def _place(share: float, shape: Shape, storage: Storage) -> tuple[float, float]:
    """Return the position that costs a share of the parameters, and its derivative by the share."""
    if share >= 1:
        return math.inf, 0.0
    m, n = matrix_of(shape)
    rank = rank_of_share(share, shape, storage)
    saved = 2 * rank if storage_of(shape, storage) == "pivoted" else 0
    return rank, m * n / (m + n - saved)


def _along_budget(slopes: Sequence[float], shares: Sequence[float], budget: Budget) -> list[float]:
    """Return the slopes without their component along the sizes; 0 for shares that cannot move.

    Shares at their floor that would decrease are excluded, so that they do not affect the others.
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
    """Bias-corrected running means of the gradient and its square."""

    def __init__(self, count: int) -> None:
        self._mean = [0.0] * count
        self._square = [0.0] * count
        self._steps = 0

    def direction(self, gradient: Sequence[float]) -> list[float]:
        """Return the step for the next gradient at learning rate 1."""
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
    """Return the nearest shares, between floor and 1, that cost exactly the budget.

    A share costs itself times the size of the dense sublayer, so the nearest point subtracts a
    multiple of the sizes.
    """
    sizes, floors = _sizes(budget), budget.shares(budget.floors)
    largest = max(sizes)

    def at(shift: float) -> list[float]:
        return [
            min(max(share - shift * size / largest, floor), 1.0)
            for share, size, floor in zip(shares, sizes, floors, strict=True)
        ]

    span = (max(map(abs, shares)) + 1) * largest / min(sizes)  # moves every share to a bound
    low, high = -span, span
    for _ in range(100):
        middle = (low + high) / 2
        spent = sum(share * size for share, size in zip(at(middle), sizes, strict=True))
        low, high = (middle, high) if spent > budget.parameters else (low, middle)
    return at(high)


def _sizes(budget: Budget) -> list[int]:
    return list(map(numel, budget.shapes))
