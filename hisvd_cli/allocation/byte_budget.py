"""Rank and bits of every sublayer at once, within a budget of bytes.

A sublayer of shape ``(m, n)`` is dense or a plain pair of rank r, its numbers stored as they are or
rounded to 8 or 4 bits. Legend: e_j the energies of the plan's metric; w(r) the share of ‖W‖² in
the r largest singular values of W; η the noise beside the signal and D the loss of rounding W
itself (see ``rounding_noise.py``), both 0 where nothing is rounded. What a choice loses is

    Σ_{j>r} e_j + η·Σ_{j≤r} e_j + D·w(r)    for a pair,    D    for a dense sublayer.

The first term is truncation. The second is rounding U: its columns have unit norm and its rows look
alike, so that noise of η times their mean square meets what V keeps, Σ_{j≤r} e_j, at any r. The
third is rounding V: its rows are UᵀW, and their noise meets G as that of W does, by their share of
‖W‖², which is w(r) at most and nearly that.

Among all choices of a sublayer, those on the lower convex hull of loss over bytes are what some
price of a byte asks for; taking steps along all hulls in the order of what a byte saves is optimal
but for the last step (as in :mod:`hisvd_cli.allocation.methods.waterfill`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.allocation.budget import full_rank, is_dense
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.linalg.convex_hull import lower_hull
from hisvd_cli.modeling.layers.quantized import quantized_bytes
from hisvd_cli.modeling.sublayers import Shape
from hisvd_cli.utils.errors import BudgetError

FULL_BITS = 16
"""Stands for numbers that stay as the model has them."""
BITS = (16, 8, 4)
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Candidate:
    """What is known of a sublayer.

    Attributes:
        shape: ``(m, n)``.
        energy: e ``[min(m, n)]`` in the plan's metric, falling.
        weight_energy: σ² of W, likewise.
        roundings: bits → what rounding W to them does.
        floor: its smallest rank.
        width: bytes of a number that stays as it is.
    """

    shape: Shape
    energy: Tensor
    weight_energy: Tensor
    roundings: Mapping[int, Rounding]
    floor: int = 1
    width: int = 2

    @property
    def full_bytes(self) -> int:
        """Bytes of the sublayer before compression."""
        return self.shape[0] * self.shape[1] * self.width

    def truncated(self) -> Tensor:
        """Return what truncation alone loses, at each rank from 0 up ``[min(m, n) + 1]``."""
        kept = _sums(self.energy)
        return (kept[-1] - kept).clamp_min(0)

    def noise_of_u(self, bits: int) -> Tensor:
        """Return what rounding U loses, at each rank ``[min(m, n) + 1]``."""
        return self.roundings[bits].noise * _sums(self.energy)

    def noise_of_v(self, bits: int) -> Tensor:
        """Return what rounding V loses, at each rank ``[min(m, n) + 1]``."""
        shares = _sums(self.weight_energy)
        return self.roundings[bits].loss * shares / shares[-1].clamp_min(_TINY)

    def losses(self, bits: int) -> Tensor:
        """Return what a pair of each rank loses ``[min(m, n) + 1]``."""
        loss = self.truncated()
        return loss if bits == FULL_BITS else loss + self.noise_of_u(bits) + self.noise_of_v(bits)

    def dense_loss(self, bits: int) -> float:
        """Return what the dense sublayer loses at some bits."""
        return 0.0 if bits == FULL_BITS else self.roundings[bits].loss


def _sums(values: Tensor) -> Tensor:
    """Return sums of the first 0, 1, … values in float64."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).double()


def matrix_bytes(shape: Shape, bits: int, group: int, width: int) -> int:
    """Return the bytes of a matrix on disk, scales included.

    Args:
        shape: of the matrix.
        bits: 16 (as it is), 8 or 4.
        group: numbers that share a scale, with 4 bits.
        width: bytes of a number that stays as it is.
    """
    if bits == FULL_BITS:
        return shape[0] * shape[1] * width
    return quantized_bytes(shape, bits, group)


def stored_bytes(shape: Shape, rank: int, bits: int, group: int, width: int) -> int:
    """Return the bytes of a sublayer: of the matrix at full rank, else of a plain pair."""
    m, n = shape
    if rank >= full_rank(shape):
        return matrix_bytes(shape, bits, group, width)
    return sum(matrix_bytes(each, bits, group, width) for each in ((rank, n), (m, rank)))


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a sublayer.

    Attributes:
        rank: the rank; the full one is dense.
        bits: 16 (as it is), 8 or 4.
        price: what it counts in the budget: bytes, or those that a published method claims.
        loss: what it loses.
    """

    rank: int
    bits: int
    price: int
    loss: float


def choices(candidate: Candidate, bits: Sequence[int], group: int, step: int) -> list[Choice]:
    """Return the ways to store a sublayer that lose less than every cheaper one, cheapest first.

    Args:
        candidate: the sublayer.
        bits: which bits are allowed.
        group: numbers that share a scale, with 4 bits.
        step: ranks are multiples of this.
    """
    shape, width, full = candidate.shape, candidate.width, full_rank(candidate.shape)
    found = []
    for each in bits:
        dense = stored_bytes(shape, full, each, group, width)
        found.append(Choice(full, each, dense, candidate.dense_loss(each)))
        losses = candidate.losses(each).tolist()
        for rank in range(candidate.floor, full, step):
            price = stored_bytes(shape, rank, each, group, width)
            if price >= dense or is_dense(rank, shape):
                break
            found.append(Choice(rank, each, price, losses[rank]))
    return falling(found)


def falling(found: Iterable[Choice]) -> list[Choice]:
    """Return the choices that lose less than every cheaper one, cheapest first."""
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.price, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def least_price(options: Sequence[Sequence[Choice]]) -> int:
    """Return what the cheapest choices of all sublayers take."""
    return sum(each[0].price for each in options)


def spend(options: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """Return a choice per sublayer, within a budget, with the least sum of losses.

    The sum is above the least by at most what one step of one sublayer saves.

    Args:
        options: of each sublayer, as :func:`falling` returns them.
        budget: what all of them may take.

    Raises:
        BudgetError: the cheapest take more.
    """
    least = least_price(options)
    if least > budget:
        raise BudgetError(
            f"The smallest choices allowed already take {least:,} bytes, {least - budget:,} more "
            f"than the budget of {budget:,}.",
            "Raise --bytes-ratio, or lower --min-rank-ratio or --multiple-of.",
        )
    at, left = _along_hulls(options, budget - least)
    return _filled(options, at, left)


def _along_hulls(options: Sequence[Sequence[Choice]], left: int) -> tuple[list[int], int]:
    """Take the steps along all hulls in the order of what a byte of them saves, as far as the
    budget goes; return where each sublayer is, and what is left."""
    hulls = [lower_hull([c.price for c in own], [c.loss for c in own]) for own in options]
    steps: list[tuple[float, int, int]] = []
    for i, corners in enumerate(hulls):
        for k in range(1, len(corners)):
            before, after = options[i][corners[k - 1]], options[i][corners[k]]
            steps.append(((after.loss - before.loss) / (after.price - before.price), i, k))
    at, stopped = [0] * len(options), set[int]()
    for _, i, k in sorted(steps):
        price = options[i][hulls[i][k]].price - options[i][at[i]].price
        if i not in stopped and price <= left:
            at[i], left = hulls[i][k], left - price
        else:
            stopped.add(i)
    return at, left


def _filled(options: Sequence[Sequence[Choice]], at: list[int], left: int) -> list[Choice]:
    """Spend what is left where a byte saves most, choices off the hulls included."""
    heap: list[tuple[float, int, int]] = []

    def offer(i: int) -> None:
        now = options[i][at[i]]
        reachable = range(at[i] + 1, len(options[i]))
        best: tuple[float, int, int] | None = None
        for k in reachable:
            price = options[i][k].price - now.price
            if price > left:
                break
            step = ((options[i][k].loss - now.loss) / price, i, k)
            best = step if best is None else min(best, step)
        if best:
            heapq.heappush(heap, best)

    for i in range(len(options)):
        offer(i)
    while heap:
        _, i, k = heapq.heappop(heap)
        price = options[i][k].price - options[i][at[i]].price
        if price <= left:
            at[i], left = k, left - price
        offer(i)
    return [own[k] for own, k in zip(options, at, strict=True)]
