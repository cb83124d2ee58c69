"""Optimal ranks under a separable loss.

Minimises ``Σ_l tail_l(r_l)`` with ``Σ_l cost_l(r_l)`` within the budget, where dense is one of the
choices (loss 0, cost of the matrix). The solutions of the Lagrangian for all multipliers are the
corners of the lower convex hull of each sublayer's losses over its costs: the steps between corners
are taken in order of energy saved per parameter until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hisvd_cli.allocation.budget import Budget, full_rank, is_dense
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.linalg.convex_hull import lower_hull
from hisvd_cli.modeling.layers.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor


@ALLOCATORS.register("waterfill")
def waterfill(spectra: Sequence[Spectrum], budget: Budget) -> Allocation:
    """Return the ranks with the least sum of tail energies within the budget.

    The sum exceeds that of the best integer ranks by at most the saving of one step of a sublayer.

    Args:
        spectra: one per sublayer; their energies are the losses of dropped components.
        budget: the parameter budget.
    """
    ranks = optimal_ranks(budget, [s.energy for s in spectra])
    return Allocation(ranks, list(ranks))


def optimal_ranks(budget: Budget, energies: Sequence[Tensor]) -> list[int]:
    """Return the ranks that lose least energy within a budget; a dense sublayer has full rank.

    Args:
        budget: the parameter budget.
        energies: of each sublayer, the loss if each component is dropped ``[min(m, n)]``, falling.
    """
    hulls = [
        _hull(energy, shape, floor, budget)
        for energy, shape, floor in zip(energies, budget.shapes, budget.floors, strict=True)
    ]
    ranks = [hull.ranks[0] for hull in hulls]
    left = budget.parameters - budget.spent(ranks)
    taken = [0] * len(hulls)
    stopped: set[int] = set()
    for i in _by_rate(hulls):
        if i not in stopped and (price := hulls[i].prices[taken[i]]) <= left:
            taken[i], left = taken[i] + 1, left - price
            ranks[i] = hulls[i].ranks[taken[i]]
        else:
            stopped.add(i)
    return budget.filled(ranks, energies)


@dataclass(frozen=True)
class _Hull:
    """The corners of one sublayer's convex hull, cheapest first.

    Attributes:
        ranks: rank at each corner; the last may be dense.
        prices: parameters of the step to each corner but the first.
        rates: energy saved per parameter of each step, falling.
    """

    ranks: list[int]
    prices: list[int]
    rates: Tensor


def _hull(energy: Tensor, shape: Shape, floor: int, budget: Budget) -> _Hull:
    import torch

    full, step = full_rank(shape), budget.multiple_of
    ranks = [r for r in range(floor, full, step) if not is_dense(r, shape, budget.storage)]
    ranks.append(full)
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).double()
    losses = tails[ranks].tolist()
    costs = [budget.cost(rank, shape) for rank in ranks]
    corners = lower_hull(costs, losses)
    prices = torch.tensor([costs[i] for i in corners]).diff()
    falls = -torch.tensor([losses[i] for i in corners], dtype=torch.float64).diff()
    return _Hull([ranks[i] for i in corners], prices.tolist(), falls / prices)


def _by_rate(hulls: Sequence[_Hull]) -> list[int]:
    """Return the sublayer of each step, for the steps of all sublayers, best rate first."""
    import torch

    rates = torch.cat([hull.rates for hull in hulls])
    owners = torch.cat([torch.full((len(hull.prices),), i) for i, hull in enumerate(hulls)])
    order: list[int] = owners[rates.argsort(descending=True, stable=True)].tolist()
    return order
