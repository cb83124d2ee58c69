"""The parts of a plan: its layers, its layer types, and its byte counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hisvd_cli.allocation.byte_frontier import Point
from hisvd_cli.modeling.layers.shapes import Shape


@dataclass(frozen=True)
class SublayerPlan:
    """The plan of one sublayer.

    ``rank`` is the full rank if ``dense``. ``bits`` is 16 for the dtype of the model; ``bytes`` on
    disk is None if the plan counts parameters. ``loss`` is Σ_{j>rank} σ_j² plus the loss of
    rounding.
    """

    name: str
    layer: int
    cluster: str
    shape: Shape
    density: float | None
    baseline_rank: int
    rank: int
    full_rank: int
    dense: bool
    parameters: int
    loss: float
    bits: int = 16
    bytes: int | None = None


@dataclass(frozen=True)
class BytePlan:
    """The byte counts of a plan by bytes, including scales.

    Attributes:
        ratio: the requested bytes ratio.
        budget: maximum bytes of the sublayers.
        kept: bytes of the sublayers after compression.
        full: bytes of the sublayers before compression.
        model: bytes of the whole model before compression.
        method: rounding method, nearest or gptq.
        group_size: numbers that share a scale at 4 bits.
        frontier: size and predicted loss of this and other layouts at several ratios.
    """

    ratio: float
    budget: int
    kept: int
    full: int
    model: int
    method: Literal["nearest", "gptq"]
    group_size: int
    frontier: list[Point]

    @property
    def kept_ratio(self) -> float:
        """Kept share of the bytes of the planned sublayers."""
        return self.kept / self.full

    @property
    def model_ratio(self) -> float:
        """Kept share of the bytes of the whole model."""
        return (self.model - self.full + self.kept) / self.model


@dataclass(frozen=True)
class ClusterPlan:
    """One sublayer type: count, mean density, tail share T_c, stage-2 factor, keep ratio."""

    cluster: str
    sublayers: int
    density: float | None
    tail_share: float
    factor: float | None
    kept_ratio: float
