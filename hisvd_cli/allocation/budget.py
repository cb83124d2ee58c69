"""Parameter budgets: the cost of ranks, and ranks that meet a budget.

A pair of rank r costs ``r(m+n)`` parameters, a dense sublayer ``mn``. Both are equal at the
break-even rank ``k* = mn/(m+n)``; a rank at or above it means dense. In pivoted storage a pair
costs ``r(m+n−r) + m``, with m indices, and breaks even just below full rank. A stack of E experts
with a common rank costs E times as much as one of them; its pairs are always plain.

Real-valued ranks are those of a plain pair in any storage: they express a share of mn. Integer
ranks are the stored ones.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hisvd_cli.modeling.layers.shapes import Shape, copies, matrix_of, numel, storage_of
from hisvd_cli.utils.errors import BudgetError

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.modeling.layers.lowrank import Storage

_ALMOST = 1e-9
"""Tolerance of rounding down: real-valued ranks carry rounding errors."""


def full_rank(shape: Shape) -> int:
    """Return ``min(m, n)``."""
    return min(matrix_of(shape))


def break_even(shape: Shape) -> float:
    """Return ``k* = mn/(m+n)``, the rank at which a plain pair is as large as the matrix."""
    m, n = matrix_of(shape)
    return m * n / (m + n)


def is_dense(rank: float, shape: Shape, storage: Storage = "pair") -> bool:
    """Return whether a rank is at or above break-even, so that the sublayer stays dense."""
    m, n = matrix_of(shape)
    return rank >= min(m, n) or _factored(rank, shape, storage) >= m * n


def cost(rank: float, shape: Shape, storage: Storage = "pair") -> float:
    """Return the parameters of a sublayer at ``rank`` (all of them if dense)."""
    if is_dense(rank, shape, storage):
        return numel(shape)
    return copies(shape) * _factored(rank, shape, storage)


def _factored(rank: float, shape: Shape, storage: Storage) -> float:
    """Return the parameters of one pair."""
    m, n = matrix_of(shape)
    return rank * (m + n) if storage_of(shape, storage) == "pair" else rank * (m + n - rank) + m


def rank_of_share(share: float, shape: Shape, storage: Storage = "pair") -> float:
    """Return the real-valued rank that costs ``share`` of the parameters; 0 if the share is too
    small."""
    m, n = matrix_of(shape)
    if storage_of(shape, storage) == "pair":
        return share * break_even(shape)
    # The smaller root of r² − (m+n)r + (share·mn − m) = 0.
    return ((m + n) - math.sqrt((m + n) ** 2 - 4 * max(share * m * n - m, 0.0))) / 2


@dataclass(frozen=True)
class Budget:
    """The parameter budget of the sublayers that a plan covers.

    Attributes:
        shapes: ``(m, n)`` of each sublayer, or ``(E, m, n)``.
        parameters: the number of parameters that all of them together may keep.
        floors: minimum rank of each sublayer.
        multiple_of: ranks of truncated sublayers are multiples of this.
        storage: storage of the pairs.
    """

    shapes: Sequence[Shape]
    parameters: int
    floors: Sequence[int]
    multiple_of: int = 1
    storage: Storage = "pair"

    def __post_init__(self) -> None:
        least = self.spent(self.floors)
        if least > self.parameters:
            raise BudgetError(
                f"The minimum ranks take {least:,} parameters, {least - self.parameters:,} more "
                f"than the budget of {self.parameters:,}.",
                "Raise `plan.ratio`, or lower `plan.min_rank_ratio` or `plan.multiple_of`.",
            )

    def cost(self, rank: int, shape: Shape) -> int:
        """Return the parameters of a sublayer at an integer rank."""
        return int(cost(rank, shape, self.storage))

    def spent(self, ranks: Sequence[int]) -> int:
        """Return the parameters of all sublayers at integer ranks."""
        return sum(self.cost(r, s) for r, s in zip(ranks, self.shapes, strict=True))

    def shares(self, ranks: Sequence[int]) -> list[float]:
        """Return the share of its parameters that each sublayer costs at an integer rank."""
        return [
            self.cost(rank, shape) / numel(shape)
            for rank, shape in zip(ranks, self.shapes, strict=True)
        ]

    def scaled(self, baselines: Sequence[float]) -> list[float]:
        """Return ranks ``clip(λ·baseline, floor, k*)`` with the λ that spends the budget.

        Baselines are positive, and real-valued as the ranks are. The cost is continuous in λ,
        because a pair at break-even costs the same as the dense matrix.
        """
        limits = [break_even(shape) for shape in self.shapes]
        floors = [self._plain(*each) for each in zip(self.floors, self.shapes, strict=True)]

        def at(scale: float) -> list[float]:
            return [
                min(max(scale * b, floor), limit)
                for b, floor, limit in zip(baselines, floors, limits, strict=True)
            ]

        def spent(scale: float) -> float:
            return sum(cost(r, s) for r, s in zip(at(scale), self.shapes, strict=True))

        high = max(limit / b for limit, b in zip(limits, baselines, strict=True))
        return at(_bisect(spent, self.parameters, high))

    def _plain(self, rank: int, shape: Shape) -> float:
        """Return the real-valued rank of the plain pair with the cost of ``rank``."""
        if storage_of(shape, self.storage) == "pair":
            return rank
        return self.cost(rank, shape) / sum(matrix_of(shape))

    def rounded(
        self, ranks: Sequence[float], energies: Sequence[Tensor], nearest: bool = False
    ) -> list[int]:
        """Return integer ranks within the budget.

        Real-valued ranks are rounded down (to dense at break-even). The remaining budget is then
        spent in steps, each on the sublayer whose next components have the most energy per
        parameter.

        Args:
            ranks: real-valued ranks that meet the budget.
            energies: σ² of each sublayer's components ``[min(m, n)]``, falling; of a stack, the
                sums over its experts.
            nearest: first give every sublayer at most one step, so that ranks stay close to their
                real values.

        Returns:
            Ranks; a dense sublayer has its full rank.
        """
        stored = [
            full_rank(s)
            if is_dense(r + _ALMOST, s)
            else rank_of_share(r / break_even(s), s, self.storage)
            for r, s in zip(ranks, self.shapes, strict=True)
        ]
        return self.settled(stored, energies, nearest)

    def settled(
        self, ranks: Sequence[float], energies: Sequence[Tensor], nearest: bool = False
    ) -> list[int]:
        """Return integer ranks as :meth:`rounded` does, from ranks in the storage of the budget."""
        step = self.multiple_of
        whole = [
            full_rank(s)
            if is_dense(r + _ALMOST, s, self.storage)
            else max(int(r + _ALMOST) // step * step, floor)
            for r, s, floor in zip(ranks, self.shapes, self.floors, strict=True)
        ]
        if nearest:
            whole = self._fill(whole, energies, steps=1)
        return self.filled(whole, energies)

    def filled(self, ranks: Sequence[int], energies: Sequence[Tensor]) -> list[int]:
        """Return integer ranks after spending the remaining budget where it saves most loss.

        Args:
            ranks: integer ranks within the budget.
            energies: as for :meth:`rounded`.
        """
        return self._fill(ranks, energies, steps=max(map(full_rank, self.shapes)))

    def _fill(self, ranks: Sequence[int], energies: Sequence[Tensor], steps: int) -> list[int]:
        """Return ranks after spending the remaining budget, with at most ``steps`` steps each."""
        tails = [_tail_sums(energy) for energy in energies]
        # A rank that costs as much as the matrix takes the rest of it for nothing.
        filled = [
            full_rank(s) if is_dense(r, s, self.storage) else r
            for r, s in zip(ranks, self.shapes, strict=True)
        ]
        taken = [0] * len(filled)
        left = self.parameters - self.spent(filled)
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
            # What does not fit now never will: the remaining budget only decreases.
            if price <= left:
                filled[i], left = following, left - price
                taken[i] += 1
                offer(i)
        return filled

    def _step(self, rank: int, shape: Shape) -> tuple[int, int]:
        """Return the next rank above ``rank`` and its additional cost."""
        following = rank + self.multiple_of
        if is_dense(following, shape, self.storage):
            following = full_rank(shape)
        return following, self.cost(following, shape) - self.cost(rank, shape)


def _tail_sums(energy: Tensor) -> list[float]:
    """Return ``tail[r] = Σ_{j ≥ r} e_j`` for r from 0 to the number of components."""
    reversed_sums = energy.flip(0).cumsum(0).flip(0)
    return [*reversed_sums.tolist(), 0.0]


def _bisect(function: Callable[[float], float], target: float, high: float) -> float:
    """Return the largest x in [0, high] with ``function(x) ≤ target``; function increases."""
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
