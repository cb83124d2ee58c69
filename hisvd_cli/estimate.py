"""What a run would take: bytes, memory and time, from shapes and one short measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hisvd_cli.blocks import build_meta_model, decoder_blocks
from hisvd_cli.sublayers import Sublayer, find_sublayers

if TYPE_CHECKING:
    from hisvd_cli.build.calibration import CalibrationRequest
    from hisvd_cli.source import Source

_IMPORTS_BYTES = 400_000_000  # resident after importing torch and transformers
_EIGH_FLOPS = 25  # of an eigendecomposition with vectors, in units of size³ at a product's rate


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


def estimate_calibration(source: Source, request: CalibrationRequest, batch: int) -> dict[str, Any]:
    """Return bytes on disk, peak memory and seconds of a calibration.

    Moments are counted at their input side, the larger of the two, so this is an upper estimate.
    """
    model = build_meta_model(source)
    prefix, layers = decoder_blocks(model)
    sublayers = find_sublayers(prefix, list(layers))
    width = model.config.get_text_config().hidden_size
    dtype: torch.dtype = getattr(torch, request.dtype)
    device = torch.device(request.device)
    tokens = request.samples * request.seqlen
    per_block = _moment_sizes([s for s in sublayers if s.layer == 0])
    parameters = sum(s.shape[0] * s.shape[1] for s in sublayers)
    forward = 2 * parameters * tokens
    moments = 2 * sum(size**2 for size in per_block) * tokens * len(layers)
    block_bytes = 4 * sum(p.numel() for p in layers[0].parameters())
    hidden = tokens * width * dtype.itemsize
    widest = max(max(s.shape) for s in sublayers)
    activations = batch * request.seqlen * (12 * width + 4 * widest) * 4
    seconds = forward / product_rate(device, dtype) + moments / product_rate(device, torch.float32)
    outside = source.weights.total_bytes - 2 * parameters
    return {
        "tokens": tokens,
        "bytes": 4 * sum(size**2 for size in per_block) * len(layers),
        "peak_memory_bytes": _IMPORTS_BYTES
        + block_bytes
        + 8 * sum(size**2 for size in per_block)
        + hidden
        + activations
        + max(outside, 0),
        "seconds": seconds,
    }


def _moment_sizes(sublayers: Sequence[Sublayer]) -> list[int]:
    """Return the widths of a block's moments: sublayers of equal input width, next to each other,
    share one in every architecture that is known here."""
    sizes: list[int] = []
    previous = 0
    for s in sublayers:
        m, n = s.shape
        if n != previous:
            sizes.append(min(m, n))
        previous = n
    return sizes


def estimate_decomposition(sublayers: Sequence[Sublayer]) -> float:
    """Return the seconds that factoring all sublayers takes, spectra included."""
    flops = sum(
        2 * _EIGH_FLOPS * min(s.shape) ** 3 + 4 * s.shape[0] * s.shape[1] * min(s.shape)
        for s in sublayers
    )
    return flops / product_rate(torch.device("cpu"), torch.float64, 512)
