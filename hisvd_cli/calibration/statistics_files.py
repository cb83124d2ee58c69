"""Reads the statistics of linear layers from the files of a block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.linalg.moments import Moment, Side
from hisvd_cli.linalg.statistics import Gradient, Statistics, WeightGradients
from hisvd_cli.utils.files.tensorfile import read_tensors

WEIGHT_PARTS = ("mean", "output", "input")
"""Suffixes of tensor names in a file of weight gradients: the fields of ``WeightGradients``."""
AGAIN = "Calibrate again."


def read_stems(path: Path, device: torch.device | str, stems: Collection[str]) -> dict[str, Tensor]:
    """Read the tensors whose name is one of ``stems``, with or without a suffix."""

    def wanted(name: str) -> bool:
        return name in stems or name.rpartition(".")[0] in stems

    tensors, _ = read_tensors(path, AGAIN, wanted)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def join_gradients(
    known: Statistics,
    name: str,
    key: str,
    tensors: dict[str, Tensor],
    share: float,
    weights: bool,
) -> Statistics:
    """Return the statistics of a layer with its gradients.

    Args:
        known: moment and channels.
        name: name of the layer.
        key: key of its moment.
        tensors: gradients of the block.
        share: share of the sequences in the first half.
        weights: whether the tensors include weight gradients.
    """
    parts = (tensors[f"sequences.{name}.{part}"] for part in WEIGHT_PARTS)
    sequences = WeightGradients(*parts) if weights else None
    side: Side = "output" if f"{name}.output" in tensors else "input"
    moment = Moment(tensors[f"{name}.{side}"], side)
    gradient = Gradient(moment, float(tensors[f"{name}.square"]))
    whole = replace(known, gradient=gradient, weight_gradients=sequences)
    if share == 1 or known.moment is None:
        return whole
    moments = _halves(known.moment, tensors[f"{key}.half"], share)
    gradients = (
        Gradient(half, gradient.mean_square)
        for half in _halves(moment, tensors[f"{name}.half"], share)
    )
    one, other = (
        Statistics(moment, known.channels, gradient)
        for moment, gradient in zip(moments, gradients, strict=True)
    )
    return replace(whole, halves=(one, other))


def _halves(whole: Moment, first: Tensor, share: float) -> tuple[Moment, Moment]:
    """Return the moments of both halves, given those of the whole and of the first half."""
    wide = first.double()
    rest = (whole.matrix.double() - share * wide) / (1 - share)
    return Moment(wide, whole.side), Moment(rest, whole.side)


def side_of(key: str) -> Side:
    return "output" if key.endswith(".output") else "input"


def block_file(layer: int) -> str:
    """Return the name of the file with the moments or the gradients of a block."""
    return f"block-{layer:05d}.safetensors"


def weights_file(layer: int) -> str:
    """Return the name of the file with the weight gradients of a block."""
    return f"weights-{layer:05d}.safetensors"
