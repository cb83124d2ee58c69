"""Builds the tensors of a part of a checkpoint: unchanged, or factored as planned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.layout import Factored, Part, block_number
from hisvd_cli.compression.methods import Decomposer
from hisvd_cli.linalg.pivoting import pivoted
from hisvd_cli.linalg.statistics import Need, Statistics
from hisvd_cli.linalg.truncation import decomposing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import NumericalError


@dataclass(frozen=True)
class PartInputs:
    """The inputs of a part: tensors by the name they are read by, and statistics of linears."""

    tensors: Mapping[str, Tensor]
    known: Mapping[str, Statistics]


@dataclass(frozen=True)
class PartBuilder:
    """Builds the tensors of parts.

    Attributes:
        source: the dense model.
        parts: the parts of a layout by name.
        plan: ranks and storage.
        calibration: statistics, for methods that use them.
        method: the decomposer with its arguments bound.
        needs: statistics that it needs.
        device: device of decompositions.
    """

    source: Source
    parts: Mapping[str, Part]
    plan: Plan
    calibration: Calibration | None
    method: Decomposer
    needs: Collection[Need]
    device: torch.device

    def read(self, part: str) -> PartInputs:
        """Return the inputs of a part; of a stack only the statistics, since all its experts
        together may not fit into memory. Raises SourceError, NumericalError."""
        factored = self.parts[part].factored
        if factored is None:
            read = self.source.original.weights.read
            return PartInputs({name: read(name) for name in self.parts[part].copied.values()}, {})
        known: Mapping[str, Statistics] = {}
        if self.calibration:
            known = self.calibration.statistics(
                block_number(part), self.needs, self.device, factored.weights
            )
        stored = () if factored.stacked else factored.weights.values()
        return PartInputs({name: self.source.weights.read(name) for name in stored}, known)

    def build(self, part: str, inputs: PartInputs) -> dict[str, Tensor]:
        """Return the tensors of a part. Raises NumericalError."""
        factored = self.parts[part].factored
        if factored is None:
            copied = self.parts[part].copied
            return {written: inputs.tensors[name] for written, name in copied.items()}
        if factored.stacked:
            return self._stack(factored, inputs.known)
        ((member, stored),) = factored.weights.items()
        weight = inputs.tensors[stored]
        u, v = self.decomposed(member, weight, inputs.known.get(member, Statistics()))
        return self.stored(member, u, v, weight.dtype)

    def _stack(self, factored: Factored, known: Mapping[str, Statistics]) -> dict[str, Tensor]:
        """Return V ``[E, r, n]`` and U ``[E, m, r]`` of a stack of experts."""
        rank, pairs, dtype = self.plan.ranks[factored.name], [], torch.float32
        for member, stored in factored.weights.items():
            weight = self.source.weights.read(stored)
            dtype = weight.dtype
            with decomposing(member):
                statistics = known.get(member, Statistics())
                u, v = self.method(weight.to(self.device), statistics, rank)
            pairs.append((v.to("cpu", dtype), u.to("cpu", dtype)))
        names = factored.tensors("pair")
        tensors = {
            n: torch.stack(each) for n, each in zip(names, zip(*pairs, strict=True), strict=True)
        }
        return self._finite(factored.name, tensors, dtype)

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
        storage = self.plan.storage
        factors = pivoted(u, v) if storage == "pivoted" else (v, u)
        tensors: dict[str, Tensor] = {}
        for name, tensor in zip(self._names(sublayer), factors, strict=True):
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            tensors[name] = tensor.to("cpu", kind)
        return self._finite(sublayer, tensors, dtype)

    def _names(self, sublayer: str) -> list[str]:
        factored = (part.factored for part in self.parts.values())
        found = next(each for each in factored if each and each.name == sublayer)
        return found.tensors(self.plan.storage)

    def weight_of(self, sublayer: str, part: str, inputs: PartInputs) -> Tensor:
        """Return the weight of the sublayer of a part, on the device of decompositions."""
        factored = self.parts[part].factored
        assert factored is not None
        return inputs.tensors[factored.weights[sublayer]].to(self.device)

    def _finite(
        self, sublayer: str, tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise NumericalError(
                f"The decomposition of {sublayer} is not finite in {str(dtype)[6:]}.",
                "Check the model with 'hisvd inspect', and calibrate again.",
            )
        return tensors
