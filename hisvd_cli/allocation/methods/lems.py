"""One measured divergence per sublayer, carried along its tail curve (LEMS, 2026).

The loss of a sublayer at rank r is ``KL · tail(r) / tail(probe rank) · (1 + γ·h)``: KL is measured
with that sublayer alone truncated to the probe rank; the depth factor falls evenly from 1 + γ at
the first block (h = 1) to 1 at the last (h = 0). The ranks of least total loss are found by
Lagrange multipliers, where the paper's program uses an integer programme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hisvd_cli.allocation.budget import Budget, break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Probe
from hisvd_cli.allocation.methods.waterfill import optimal_ranks
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.utils.errors import NumericalError


@ALLOCATORS.register("lems", needs={"moments"})
def lems(
    spectra: Sequence[Spectrum],
    budget: Budget,
    *,
    probe: Probe,
    probe_ratio: float,
    depth_factor: float,
) -> Allocation:
    """Allocate the ranks of least predicted divergence.

    Args:
        spectra: one per sublayer.
        budget: what they may keep.
        probe: measures the divergences.
        probe_ratio: probe rank, as a share of break-even.
        depth_factor: γ.

    Raises:
        NumericalError: a divergence is not finite.
    """
    last = max(s.layer for s in spectra) or 1
    losses = []
    for s in spectra:
        rank = max(1, int(probe_ratio * break_even(s.shape)))
        tail = float(s.energy[rank:].sum())
        depth = 1 + depth_factor * (last - s.layer) / last
        measured = _measured(probe, s.name, rank) * depth
        losses.append(s.energy * (measured / tail if tail else 0.0))
    ranks = optimal_ranks(budget, losses)
    return Allocation(ranks, list(ranks))


def _measured(probe: Probe, name: str, rank: int) -> float:
    divergence = probe.divergence(name, rank)
    if not math.isfinite(divergence):
        raise NumericalError(
            f"The divergence with {name} truncated to rank {rank} is NaN or infinite.",
            "Use --dtype float32, or another --allocator.",
        )
    return max(divergence, 0.0)  # one near 0 may round to less
