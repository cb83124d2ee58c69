"""Rank ↔ parameters: what a plan costs, and how a budget is met to the last parameter.

A pair of rank r costs ``r(m+n)`` parameters and a dense sublayer ``mn``; at the break-even rank
``k* = mn/(m+n)`` both are equal, and a rank at or above it means dense.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hisvd_cli.errors import BudgetError

Shape = tuple[int, int]


def full_rank(shape: Shape) -> int:
    """Return ``min(m, n)``."""
    return min(shape)


def break_even(shape: Shape) -> float:
    """Return ``k* = mn/(m+n)``, the rank at which a pair is as large as the matrix."""
    m, n = shape
    return m * n / (m + n)


def is_dense(rank: float, shape: Shape) -> bool:
    """Tell whether a rank is at or above break-even, where the sublayer stays dense."""
    m, n = shape
    return rank * (m + n) >= m * n


def cost(rank: float, shape: Shape) -> float:
    """Return the parameters of a sublayer at ``rank`` (``mn`` where that is dense)."""
    m, n = shape
    return m * n if is_dense(rank, shape) else rank * (m + n)


@dataclass(frozen=True)
class Budget:
    """What a plan may spend on the sublayers that it covers.

    Attributes:
        shapes: ``(m, n)`` of each sublayer.
        parameters: how many parameters all of them together may keep.
        floors: smallest rank of each sublayer.
        multiple_of: ranks of truncated sublayers are multiples of this.
    """

    shapes: Sequence[Shape]
    parameters: int
    floors: Sequence[int]
    multiple_of: int = 1

    def __post_init__(self) -> None:
        least = sum(int(cost(r, s)) for r, s in zip(self.floors, self.shapes, strict=True))
        if least > self.parameters:
            raise BudgetError(
                f"The smallest ranks allowed already take {least:,} parameters, "
                f"{least - self.parameters:,} more than the budget of {self.parameters:,}.",
                "Raise --ratio, or lower --min-rank-ratio or --multiple-of.",
            )

    def scaled(self, baselines: Sequence[float]) -> list[float]:
        """Return ``clip(λ·baseline, floor, k*)`` with the one λ that spends the budget.

        Baselines are positive and real-valued; the result is too. Its cost is continuous in λ,
        because a pair at break-even costs exactly what the dense matrix does.
        """
        limits = [break_even(shape) for shape in self.shapes]

        def at(scale: float) -> list[float]:
            return [
                min(max(scale * b, floor), limit)
                for b, floor, limit in zip(baselines, self.floors, limits, strict=True)
            ]

        def spent(scale: float) -> float:
            return sum(cost(r, s) for r, s in zip(at(scale), self.shapes, strict=True))

        high = max(limit / b for limit, b in zip(limits, baselines, strict=True))
        return at(_bisect(spent, self.parameters, high))

    def rounded(
        self, ranks: Sequence[float], energies: Sequence[Tensor], nearest: bool = False
    ) -> list[int]:
        """Return whole ranks within the budget, the remainder spent where it saves most loss.

        Real-valued ranks are rounded down (to dense at break-even); then one step at a time goes
        to the sublayer whose next components hold the most energy per parameter.

        Args:
            ranks: real-valued ranks that meet the budget.
            energies: σ² of each sublayer's components ``[min(m, n)]``, falling.
            nearest: give every sublayer at most one step first, so that ranks stay next to their
                real values; only what that leaves is spent freely.

        Returns:
            Ranks; a dense sublayer has its full rank.
        """
        step = self.multiple_of
        whole = [
            full_rank(s) if is_dense(r + 1e-9, s) else max(int(r + 1e-9) // step * step, floor)
            for r, s, floor in zip(ranks, self.shapes, self.floors, strict=True)
        ]
        if nearest:
            whole = self._fill(whole, energies, steps=1)
        return self.filled(whole, energies)

    def filled(self, ranks: Sequence[int], energies: Sequence[Tensor]) -> list[int]:
        """Return whole ranks with what they leave of the budget spent where it saves most loss.

        Args:
            ranks: whole ranks within the budget.
            energies: as for :meth:`rounded`.
        """
        return self._fill(ranks, energies, steps=max(map(full_rank, self.shapes)))

    def _fill(self, ranks: Sequence[int], energies: Sequence[Tensor], steps: int) -> list[int]:
        """Return ranks with the unspent budget given out, at most ``steps`` steps to each."""
        tails = [_tail_sums(energy) for energy in energies]
        filled = list(ranks)
        taken = [0] * len(filled)
        left = self.parameters - sum(
            int(cost(r, s)) for r, s in zip(filled, self.shapes, strict=True)
        )
        heap: list[tuple[float, int]] = []

        def offer(i: int) -> None:
            if filled[i] < full_rank(self.shapes[i]) and taken[i] < steps:
                following, price = self._step(filled[i], self.shapes[i])
                gain = tails[i][filled[i]] - tails[i][following]
                heapq.heappush(heap, (-gain / price, i))

        for i in range(len(filled)):
            offer(i)
        while heap:
            _, i = heapq.heappop(heap)
            following, price = self._step(filled[i], self.shapes[i])
            # What does not fit now never will: the budget only falls, and steps do not shrink
            # before the last one, to dense, which no longer step precedes.
            if price <= left:
                filled[i], left = following, left - price
                taken[i] += 1
                offer(i)
        return filled

    def _step(self, rank: int, shape: Shape) -> tuple[int, int]:
        """Return the next rank above ``rank`` and what it costs more."""
        following = rank + self.multiple_of
        if is_dense(following, shape):
            following = full_rank(shape)
        return following, int(cost(following, shape)) - int(cost(rank, shape))


def _tail_sums(energy: Tensor) -> list[float]:
    """Return ``tail[r] = Σ_{j ≥ r} e_j`` for r from 0 to the number of components."""
    reversed_sums = energy.flip(0).cumsum(0).flip(0)
    return [*reversed_sums.tolist(), 0.0]


def _bisect(function: Callable[[float], float], target: float, high: float) -> float:
    """Return the largest x in [0, high] with ``function(x) ≤ target``; the function rises."""
    if function(high) <= target:
        return high
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if function(middle) <= target:
            low = middle
        else:
            high = middle
    return low
