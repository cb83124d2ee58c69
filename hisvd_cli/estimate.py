"""What a run would take: bytes, memory and time, from shapes and one short measurement.

Legend: m outputs and n inputs of a sublayer; T tokens; d hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hisvd_cli.sublayers import Sublayer

_IMPORTS_BYTES = 400_000_000  # resident after importing torch and transformers
_EIGH_FLOPS = 25  # of an eigendecomposition with vectors, in units of size³ at a product's rate


@dataclass(frozen=True)
class Estimate:
    """What a calibration takes: bytes on disk, peak memory in bytes, seconds."""

    bytes: int
    peak_memory_bytes: int
    seconds: float


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Measure the rate of matrix products in FLOP/s (a fraction of a second)."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    count = 3
    started = time.perf_counter()
    for _ in range(count):
        b = a @ a
    b.sum().item()
    return count * 2 * size**3 / (time.perf_counter() - started)


def estimate_calibration(
    sublayers: Sequence[Sublayer],
    outside_parameters: int,
    width: int,
    *,
    samples: int,
    seqlen: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Estimate:
    """Estimate a calibration from above: a moment is counted for each sublayer, at its smaller
    side, though sublayers that read the same tensor share one.

    Args:
        sublayers: all of them.
        outside_parameters: parameters outside the sublayers: embeddings, norms, head.
        width: d.
        samples: windows of text.
        seqlen: tokens per window.
        batch: windows per forward pass.
        dtype: of forward passes.
        device: where they run.
    """
    tokens = samples * seqlen
    first = [s for s in sublayers if s.layer == sublayers[0].layer]
    squares = sum(min(s.shape) ** 2 for s in sublayers)
    block_squares = sum(min(s.shape) ** 2 for s in first)
    widest = max(max(s.shape) for s in first)
    memory = (
        _IMPORTS_BYTES
        + (outside_parameters + _size(first)) * dtype.itemsize
        + (8 + 4) * block_squares  # sums in float64, and their mean in float32
        + tokens * width * dtype.itemsize  # hidden states
        + batch * seqlen * (12 * width + 4 * widest) * 4  # activations of one forward pass
    )
    forward = 2 * _size(sublayers) * tokens / product_rate(device, dtype)
    products = 2 * squares * tokens / product_rate(device, torch.float32)
    return Estimate(4 * squares, memory, forward + products)


def estimate_gradients(
    sublayers: Sequence[Sublayer],
    outside_parameters: int,
    width: int,
    *,
    samples: int,
    seqlen: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    weights: bool,
) -> Estimate:
    """Estimate the reverse walk that follows a calibration; arguments as for it.

    Args:
        sublayers: all of them.
        outside_parameters: parameters outside the sublayers; all are counted as the head's.
        width: d.
        samples: windows of text.
        seqlen: tokens per window.
        batch: windows per chunk.
        dtype: of forward passes.
        device: where they run.
        weights: whether the weights' gradients are taken too.
    """
    tokens = samples * seqlen
    layers = len({s.layer for s in sublayers})
    first = [s for s in sublayers if s.layer == sublayers[0].layer]
    squares = sum(min(s.shape) ** 2 for s in sublayers)
    # Forward and backward through every block and the head; a tall weight's gradient is carried
    # to its input once more.
    passes = 2 * _size(sublayers) + 3 * outside_parameters
    passes += sum(s.shape[0] * s.shape[1] for s in sublayers if s.shape[0] > s.shape[1])
    products = squares * tokens
    whole = 0
    if weights:
        whole = sum(m * n + m * m + n * n for m, n in (s.shape for s in sublayers))
        products += _size(sublayers) * tokens
        products += samples * sum(m * n * (m + n) for m, n in (s.shape for s in sublayers))
    memory = (
        _IMPORTS_BYTES
        + (outside_parameters + _size(first)) * dtype.itemsize
        + (8 + 4) * squares // layers
        + 4 * whole // layers
        + tokens * width * dtype.itemsize  # the carried gradient
        + batch
        * seqlen
        * 3
        * sum(sum(s.shape) for s in first)
        * dtype.itemsize  # one chunk's graph
    )
    seconds = 2 * passes * tokens / product_rate(device, dtype)
    seconds += 2 * products / product_rate(device, torch.float32)
    return Estimate(4 * (squares + whole), memory, seconds)


def estimate_measuring(parameters: int, tokens: int, passes: float, rate: float) -> float:
    """Return the seconds of ``passes`` forward passes over ``tokens`` tokens at ``rate`` FLOP/s."""
    return passes * 2 * parameters * tokens / rate


def estimate_decomposition(sublayers: Sequence[Sublayer]) -> float:
    """Return the seconds that factoring all sublayers takes, spectra included."""
    flops = sum(
        2 * _EIGH_FLOPS * min(s.shape) ** 3 + 4 * s.shape[0] * s.shape[1] * min(s.shape)
        for s in sublayers
    )
    return flops / product_rate(torch.device("cpu"), torch.float64, 512)


def _size(sublayers: Sequence[Sublayer]) -> int:
    return sum(s.shape[0] * s.shape[1] for s in sublayers)
