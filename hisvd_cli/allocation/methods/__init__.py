"""Allocators: (spectra, budget, knobs) ─► ranks, one file each, found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hisvd_cli.allocation.budget import Budget
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.utils.registry import Registry


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


class Probe(Protocol):
    """The model itself, for allocators that measure: costly, so each answer is kept on disk.

    Sublayers are truncated by the plan's decomposer; all others stay dense.
    """

    def perplexity(self, name: str, rank: int) -> float:
        """Return the perplexity on probe text with one sublayer truncated to ``rank``."""
        ...

    def divergence(self, name: str, rank: int) -> float:
        """Return the mean KL (nats per token) of the dense model's distribution from that with
        one sublayer truncated to ``rank``."""
        ...

    def soft_divergence(
        self, positions: Sequence[float], width: float, step: int
    ) -> tuple[float, list[float]]:
        """Return the mean KL, and its gradient by each position, with every sublayer's component
        i (from 0) weighted by ``sigmoid((position − i − ½) / (width·full_rank))``.

        Args:
            positions: one per spectrum, in its order; ``inf`` leaves a sublayer dense.
            width: softness of the masks, as a share of the full rank.
            step: which chunk of the probe text, counted round.
        """
        ...


Allocator = Callable[..., Allocation]
"""``(spectra: Sequence[Spectrum], budget: Budget, *, knob=…, …) -> Allocation``; knobs are
keyword-only, and an allocator names only those that it uses. One that measures the model names
``probe: Probe``; one that needs more than moments declares it: ``register(name, needs=…)``."""

ALLOCATORS: Registry[Allocator] = Registry("allocator", __name__, "hisvd.allocators")

__all__ = ["ALLOCATORS", "Allocation", "Allocator", "Budget", "Probe", "Sequence", "Spectrum"]
