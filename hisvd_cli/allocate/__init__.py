"""Allocators: (spectra, budget, knobs) ─► ranks, one file each, found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hisvd_cli.budget import Budget
from hisvd_cli.registry import Registry
from hisvd_cli.spectrum import Spectrum


@dataclass(frozen=True)
class Allocation:
    """Ranks, and what led to them.

    Attributes:
        ranks: one per spectrum; a dense sublayer has its full rank.
        baselines: rank of each sublayer before any refinement.
        densities: rank density of each sublayer, where the allocator uses one.
        tail_shares: cluster → T_c, where the allocator uses it.
        factors: cluster → stage-2 factor, where the allocator uses it.
    """

    ranks: list[int]
    baselines: list[int]
    densities: list[float] = field(default_factory=list)
    tail_shares: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)


Allocator = Callable[..., Allocation]
"""``(spectra: Sequence[Spectrum], budget: Budget, *, knob=…, …) -> Allocation``; knobs are
keyword-only, and an allocator names only those that it uses."""

ALLOCATORS: Registry[Allocator] = Registry("allocator", __name__, "hisvd.allocators")

__all__ = ["ALLOCATORS", "Allocation", "Allocator", "Budget", "Sequence", "Spectrum"]
