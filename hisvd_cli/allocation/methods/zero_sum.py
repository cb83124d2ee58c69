"""Components removed so that the predicted changes of the loss cancel (ZS-SVD, 2026).

Dropping a whitened component changes the loss by δ to first order (``Spectrum.changes``). The
candidates are the smallest remaining component of each sublayer, in two heaps by the sign of δ; the
next one is chosen such that the running sum stays near zero. A component of a stack is one of each
of its experts: its δ is their sum, and the mean over the experts is its place among the candidates.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hisvd_cli.allocation.budget import Budget, full_rank
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Options
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.linalg.statistics import missing
from hisvd_cli.modeling.layers.shapes import copies, numel

if TYPE_CHECKING:
    from torch import Tensor

_ORDERS: dict[str, Callable[[float, float], float]] = {
    "zero-sum": lambda change, _energy: abs(change),
    "negative-sum": lambda change, _energy: abs(change),
    "smallest": lambda change, _energy: abs(change),
    "sigma": lambda _change, energy: energy,
    "loss-order": lambda change, _energy: change,
}
"""selection → (δ, σ²) → the key by which components are removed, smallest first."""


class ZeroSumOptions(Options):
    """Options of ``zero-sum``.

    ``zero-sum`` selects the component of least abs(δ) among those whose sign opposes the running
    sum (a positive one at a sum of 0); ``negative-sum`` the same among those with negative δ while
    there are any; ``smallest`` that of least abs(δ), ``sigma`` of least σ, ``loss-order`` of
    least δ.
    """

    selection: Literal["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"] = Field(
        "zero-sum",
        description="which component is removed next: zero-sum, smallest, negative-sum, sigma or "
        "loss-order.",
    )


@ALLOCATORS.register("zero-sum", needs={"moments", "weight-gradients"}, options=ZeroSumOptions)
def zero_sum(spectra: Sequence[Spectrum], budget: Budget, *, options: ZeroSumOptions) -> Allocation:
    """Return ranks after removing one component at a time until the budget is met.

    A sublayer saves nothing until its rank falls below break-even; one that ends at or above it
    stays dense.

    Args:
        spectra: one per sublayer, with the changes of their components.
        budget: the parameter budget.
        options: see :class:`ZeroSumOptions`.

    Raises:
        SourceError: the changes are unknown.
    """
    queue = _Queue(spectra, budget, options.selection)
    excess = sum(map(numel, budget.shapes)) - budget.parameters
    while excess > 0 and (i := queue.pop()) is not None:
        shape = budget.shapes[i]
        before = budget.cost(queue.ranks[i], shape)
        queue.drop(i)
        excess -= before - budget.cost(queue.ranks[i], shape)
    ranks = budget.settled(queue.ranks, [s.energy for s in spectra], nearest=True)
    return Allocation(ranks, list(queue.ranks))


class _Queue:
    """The smallest remaining component of each sublayer, by the sign of δ."""

    def __init__(self, spectra: Sequence[Spectrum], budget: Budget, selection: str) -> None:
        self.ranks = [full_rank(s.shape) for s in spectra]
        self._floors = budget.floors
        self._copies = [copies(s.shape) for s in spectra]
        self._changes = [_known(s).tolist() for s in spectra]
        self._energies = [s.energy.tolist() for s in spectra]
        self._selection = selection
        self._total = 0.0
        self._rising: list[tuple[float, int]] = []
        self._falling: list[tuple[float, int]] = []
        for i in range(len(spectra)):
            self._offer(i)

    def _offer(self, i: int) -> None:
        last = self.ranks[i] - 1
        if last >= self._floors[i]:
            change = self._changes[i][last]
            key = _ORDERS[self._selection](change, self._energies[i][last]) / self._copies[i]
            falls = change < 0 and self._selection in ("zero-sum", "negative-sum")
            heapq.heappush(self._falling if falls else self._rising, (key, i))

    def pop(self) -> int | None:
        """Return the sublayer whose component is removed next; None if all are at their floors."""
        falling = self._selection == "negative-sum" or self._total > 0
        first, other = (self._falling, self._rising)[:: 1 if falling else -1]
        heap = first or other
        return heapq.heappop(heap)[1] if heap else None

    def drop(self, i: int) -> None:
        """Remove the candidate of sublayer ``i``, and make its next component the candidate."""
        self.ranks[i] -= 1
        self._total += self._changes[i][self.ranks[i]]
        self._offer(i)


def _known(spectrum: Spectrum) -> Tensor:
    if spectrum.changes is None:
        raise missing("zero-sum", "weight-gradients")
    return spectrum.changes
