"""Joint choice of rank and bits for every sublayer, within a budget of bytes.

A sublayer of shape ``(m, n)`` is dense or a plain pair of rank r, in the model's dtype or quantized
to 8 or 4 bits. A stack of experts ``(E, m, n)`` keeps the model's dtype. Legend: e_j the energies
in the plan's metric; w(r) the share of ‖W‖² in the r largest singular values of W; η the
noise-to-signal ratio and D the loss of rounding W (see ``rounding_noise.py``), both 0 without
rounding. The loss of a choice is

    Σ_{j>r} e_j + η·Σ_{j≤r} e_j + D·w(r)    for a pair,    D    for a dense sublayer.

The first term is truncation. The second is rounding of U: its columns have unit norm and its rows
are alike, so that noise of η times their mean square multiplies the energy that V keeps,
Σ_{j≤r} e_j. The third is rounding of V: its rows are UᵀW, and their noise is weighted by G as that
of W is, in proportion to their share of ‖W‖², which is at most w(r) and close to it.

Steps along the lower convex hulls of loss over bytes, in order of loss saved per byte, are optimal
except for the last step (as in :mod:`hisvd_cli.allocation.methods.waterfill`).
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
from hisvd_cli.modeling.layers.shapes import Shape, copies, is_stack, matrix_of, numel
from hisvd_cli.utils.errors import BudgetError

FULL_BITS = 16
"""Stands for the dtype of the model."""
BITS = (16, 8, 4)
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Candidate:
    """A sublayer to choose rank and bits for.

    Attributes:
        shape: ``(m, n)``, or ``(E, m, n)`` for a stack.
        energy: e ``[min(m, n)]`` in the plan's metric, falling.
        weight_energy: σ² of W, likewise.
        roundings: bits → effect of rounding W; empty for a stack, which is not rounded.
        floor: minimum rank.
        width: bytes per number without rounding.
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
        return numel(self.shape) * self.width

    def truncated(self) -> Tensor:
        """Return the loss of truncation at each rank from 0 ``[min(m, n) + 1]``."""
        kept = _sums(self.energy)
        return (kept[-1] - kept).clamp_min(0)

    def noise_of_u(self, bits: int) -> Tensor:
        """Return the loss of rounding U at each rank ``[min(m, n) + 1]``."""
        return self.roundings[bits].noise * _sums(self.energy)

    def noise_of_v(self, bits: int) -> Tensor:
        """Return the loss of rounding V at each rank ``[min(m, n) + 1]``."""
        shares = _sums(self.weight_energy)
        return self.roundings[bits].loss * shares / shares[-1].clamp_min(_TINY)

    def losses(self, bits: int) -> Tensor:
        """Return the loss of a pair at each rank ``[min(m, n) + 1]``."""
        loss = self.truncated()
        return loss if bits == FULL_BITS else loss + self.noise_of_u(bits) + self.noise_of_v(bits)

    def dense_loss(self, bits: int) -> float:
        """Return the loss of the dense sublayer at some bits."""
        return 0.0 if bits_of(self.shape, bits) == FULL_BITS else self.roundings[bits].loss


def _sums(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, … values in float64."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).double()


def bits_of(shape: Shape, bits: int) -> int:
    """Return the bits of a sublayer where others have ``bits``: stacks are not quantized."""
    return FULL_BITS if is_stack(shape) else bits


def matrix_bytes(shape: tuple[int, int], bits: int, group: int, width: int) -> int:
    """Return the bytes of a matrix on disk, scales included.

    Args:
        shape: of the matrix.
        bits: 16 (not rounded), 8 or 4.
        group: numbers that share a scale at 4 bits.
        width: bytes per number without rounding.
    """
    if bits == FULL_BITS:
        return shape[0] * shape[1] * width
    return quantized_bytes(shape, bits, group)


def stored_bytes(shape: Shape, rank: int, bits: int, group: int, width: int) -> int:
    """Return the bytes of a sublayer: the matrix at full rank, otherwise a plain pair; of a stack,
    for every expert, without rounding."""
    m, n = matrix_of(shape)
    matrices = ((m, n),) if rank >= full_rank(shape) else ((rank, n), (m, rank))
    bits = bits_of(shape, bits)
    return copies(shape) * sum(matrix_bytes(each, bits, group, width) for each in matrices)


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of rank and bits for a sublayer.

    Attributes:
        rank: the rank; full rank is dense.
        bits: 16 (not rounded), 8 or 4.
        price: bytes counted in the budget, possibly by the rules of a published method.
        loss: the predicted loss.
    """

    rank: int
    bits: int
    price: int
    loss: float


def choices(candidate: Candidate, bits: Sequence[int], group: int, step: int) -> list[Choice]:
    """Return the choices for a sublayer that lose less than all cheaper ones, cheapest first.

    Args:
        candidate: the sublayer.
        bits: the allowed bits, of which a stack takes those of the model's dtype.
        group: numbers that share a scale at 4 bits.
        step: ranks are multiples of this.
    """
    shape, width, full = candidate.shape, candidate.width, full_rank(candidate.shape)
    found = []
    for each in dict.fromkeys(bits_of(shape, each) for each in bits):
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
    """Return the choices that lose less than all cheaper ones, cheapest first."""
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.price, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def least_price(options: Sequence[Sequence[Choice]]) -> int:
    """Return the total price of the cheapest choices."""
    return sum(each[0].price for each in options)


def spend(options: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """Return a choice per sublayer, within a budget, with the least sum of losses.

    The sum exceeds the minimum by at most the saving of one step of a sublayer.

    Args:
        options: the choices of each sublayer, as :func:`falling` returns them.
        budget: the maximum total price.

    Raises:
        BudgetError: the cheapest choices exceed the budget.
    """
    least = least_price(options)
    if least > budget:
        raise BudgetError(
            f"The minimum ranks and bits take {least:,} bytes, {least - budget:,} more than the "
            f"budget of {budget:,}.",
            "Raise `plan.bytes_ratio`, or lower `plan.min_rank_ratio` or `plan.multiple_of`.",
        )
    at, left = _along_hulls(options, budget - least)
    return _filled(options, at, left)


def _along_hulls(options: Sequence[Sequence[Choice]], left: int) -> tuple[list[int], int]:
    """Take steps along all hulls, in order of loss saved per byte, until the budget is spent.

    Return the index of each sublayer's choice, and the remaining budget.
    """
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
    """Spend the remaining budget where a byte saves most, including choices off the hulls."""
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
