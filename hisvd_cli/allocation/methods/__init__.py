"""Allocators: functions from spectra and a budget to ranks, one file each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hisvd_cli.allocation.budget import Budget
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.utils.registry import MANY, Options, Ratio, Ratios, Registry

WEIGHT_SPECTRA = "weight-spectra"
"""A need of allocators that read ``Spectrum.weight_energy``."""


@dataclass(frozen=True)
class Allocation:
    """Ranks, and the intermediate results behind them.

    Attributes:
        ranks: one per spectrum; a dense sublayer has its full rank.
        baselines: rank of each sublayer before refinement.
        densities: rank density of each sublayer, if the allocator uses one.
        tail_shares: cluster → T_c, if the allocator uses it.
        factors: cluster → stage-2 factor, if the allocator uses it.
    """

    ranks: list[int]
    baselines: list[int]
    densities: list[float] = field(default_factory=list)
    tail_shares: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)


class Probe(Protocol):
    """Measurements of the model. They are costly and cached on disk.

    The plan's decomposer truncates the measured sublayers; all others stay dense.
    """

    def perplexity(self, name: str, rank: int) -> float:
        """Return the perplexity on probe text with one sublayer truncated to ``rank``."""
        ...

    def divergence(self, name: str, rank: int) -> float:
        """Return the mean KL divergence (nats per token) between the dense model and the model
        with one sublayer truncated to ``rank``."""
        ...

    def soft_divergence(
        self, positions: Sequence[float], width: float, step: int
    ) -> tuple[float, list[float]]:
        """Return the mean KL divergence and its gradient with respect to each position. Component
        i (from 0) of a sublayer is weighted by ``sigmoid((position − i − ½) / (width·full_rank))``.

        Args:
            positions: one per spectrum, in its order; ``inf`` leaves a sublayer dense.
            width: softness of the masks, as a share of the full rank.
            step: index of the chunk of the probe text, modulo the number of chunks.
        """
        ...


Allocator = Callable[..., Allocation]
"""``(spectra: Sequence[Spectrum], budget: Budget, *, …) -> Allocation``. An allocator may name the
keyword-only parameters ``options`` (its options), ``probe`` (a :class:`Probe`, if it measures the
model), ``tokens`` (of the calibration), and the settings of ``[plan]``."""

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    __name__,
    "hisvd.allocators",
    ("hisvd", "uniform", "svdllm-v2", "zero-sum", "swift", "asvd", "lems", "waterfill", "learned"),
)

__all__ = [
    "ALLOCATORS",
    "MANY",
    "WEIGHT_SPECTRA",
    "Allocation",
    "Allocator",
    "Budget",
    "Options",
    "Probe",
    "Ratio",
    "Ratios",
    "Spectrum",
]
