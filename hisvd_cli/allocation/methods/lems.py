"""One measured divergence per sublayer, extrapolated along its tail energy (LEMS, 2026).

The loss of a sublayer at rank r is ``KL · tail(r) / tail(probe rank) · (1 + γ·h)``. KL is measured
with only that sublayer truncated to the probe rank; the depth factor falls linearly from 1 + γ at
the first block (h = 1) to 1 at the last (h = 0). Lagrange multipliers find the ranks of least total
loss; the authors' code uses integer programming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from hisvd_cli.allocation.budget import Budget, break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Options, Probe, Ratio
from hisvd_cli.allocation.methods.waterfill import optimal_ranks
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.utils.errors import NumericalError


class LemsOptions(Options):
    """Options of ``lems``. The probe rank is ``probe_ratio`` times break-even; γ is
    ``depth_factor``."""

    probe_ratio: Ratio = Field(0.5, description="keep ratio at which each layer is measured.")
    depth_factor: float = Field(
        5.0,
        description="the loss of the first block counts 1 plus this, falling linearly to 1 at the "
        "last.",
        ge=0,
        le=100,
    )


@ALLOCATORS.register("lems", needs={"moments"}, options=LemsOptions)
def lems(
    spectra: Sequence[Spectrum], budget: Budget, *, probe: Probe, options: LemsOptions
) -> Allocation:
    """Return the ranks of least predicted divergence.

    Args:
        spectra: one per sublayer.
        budget: the parameter budget.
        probe: measures the divergences.
        options: see :class:`LemsOptions`.

    Raises:
        NumericalError: a divergence is not finite.
    """
    last = max(s.layer for s in spectra) or 1
    losses = []
    for s in spectra:
        rank = max(1, int(options.probe_ratio * break_even(s.shape)))
        tail = float(s.energy[rank:].sum())
        depth = 1 + options.depth_factor * (last - s.layer) / last
        measured = _measured(probe, s.name, rank) * depth
        losses.append(s.energy * (measured / tail if tail else 0.0))
    ranks = optimal_ranks(budget, losses)
    return Allocation(ranks, list(ranks))


def _measured(probe: Probe, name: str, rank: int) -> float:
    divergence = probe.divergence(name, rank)
    if not math.isfinite(divergence):
        raise NumericalError(
            f"The divergence with {name} truncated to rank {rank} is NaN or infinite.",
            "Use `model.dtype` float32, or another `plan.allocator`.",
        )
    return max(divergence, 0.0)  # rounding can make it negative
