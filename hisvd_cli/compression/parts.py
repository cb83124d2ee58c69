"""Builds the tensors of a part of a checkpoint: unchanged, or factored as planned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.methods import Decomposer
from hisvd_cli.linalg.pivoting import pivoted
from hisvd_cli.linalg.statistics import Need, Statistics
from hisvd_cli.linalg.truncation import decomposing
from hisvd_cli.modeling.layers.lowrank import FACTORS
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import NumericalError


@dataclass(frozen=True)
class PartInputs:
    """The inputs of a part: tensors by name on disk, and statistics of sublayers."""

    tensors: Mapping[str, Tensor]
    known: Mapping[str, Statistics]


@dataclass(frozen=True)
class PartBuilder:
    """Builds the tensors of parts.

    Attributes:
        source: the dense model.
        parts: part → name in the checkpoint → name on disk of the source, as in a ``Layout``.
        plan: ranks and storage.
        calibration: statistics, for methods that use them.
        method: the decomposer with its arguments bound.
        needs: statistics that it needs.
        device: device of decompositions.
    """

    source: Source
    parts: Mapping[str, Mapping[str, str]]
    plan: Plan
    calibration: Calibration | None
    method: Decomposer
    needs: Collection[Need]
    device: torch.device

    def read(self, part: str) -> PartInputs:
        """Return the inputs of a part. Raises SourceError, NumericalError."""
        names = self.parts[part]
        factored = {name.rpartition(".")[0] for name in names} & self.plan.ranks.keys()
        known: Mapping[str, Statistics] = {}
        if self.calibration and factored:
            known = self.calibration.statistics(
                block_number(part), self.needs, self.device, factored
            )
        tensors: dict[str, Tensor] = {}
        for name, stored in names.items():
            if stored not in tensors:
                truncated = name.removesuffix(".weight") in self.plan.ranks
                source = self.source if truncated else self.source.original
                tensors[stored] = source.weights.read(stored)
        return PartInputs(tensors, known)

    def build(self, part: str, inputs: PartInputs) -> dict[str, Tensor]:
        """Return the tensors of a part. Raises NumericalError."""
        ranks = self.plan.ranks
        tensors: dict[str, Tensor] = {}
        for name, stored in self.parts[part].items():
            sublayer, weight = name.removesuffix(".weight"), inputs.tensors[stored]
            if name in tensors:  # added with the first factor
                continue
            if name.endswith(".weight") and sublayer in ranks:
                statistics = inputs.known.get(sublayer, Statistics())
                u, v = self.decomposed(sublayer, weight, statistics)
                tensors |= self.stored(sublayer, u, v, weight.dtype)
            else:
                tensors[name] = weight
        return tensors

    def decomposed(
        self, sublayer: str, weight: Tensor, statistics: Statistics
    ) -> tuple[Tensor, Tensor]:
        """Return U ``[m, r]`` and V ``[r, n]`` at the planned rank. Raises NumericalError."""
        with decomposing(sublayer):
            return self.method(weight.to(self.device), statistics, self.plan.ranks[sublayer])

    def stored(self, sublayer: str, u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of a pair in the checkpoint: full name → tensor, on the CPU.

        Raises:
            NumericalError: the pair is not finite in ``dtype``.
        """
        factors = pivoted(u, v) if self.plan.storage == "pivoted" else (v, u)
        tensors: dict[str, Tensor] = {}
        for leaf, tensor in zip(FACTORS[self.plan.storage], factors, strict=True):
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            tensors[f"{sublayer}.{leaf}"] = tensor.to("cpu", kind)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise NumericalError(
                f"The decomposition of {sublayer} is not finite in {str(dtype)[6:]}.",
                "Check the model with 'hisvd inspect', and calibrate again.",
            )
        return tensors


def block_of(part: str) -> str:
    """Return the part of the unchanged tensors in the same block, such as ``block-00003``."""
    return part.partition(".")[0]


def block_number(part: str) -> int:
    """Return the block index of a part inside a block."""
    return int(block_of(part).rpartition("-")[2])
