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


@dataclass(frozen=True)
class Workload:
    """What a calibration works on.

    Attributes:
        sublayers: all of them.
        outside_parameters: parameters outside the sublayers: embeddings, norms, head.
        width: d.
        samples: windows of text.
        seqlen: tokens per window.
        batch: windows per forward pass.
        dtype: of forward passes.
        device: where they run.
    """

    sublayers: Sequence[Sublayer]
    outside_parameters: int
    width: int
    samples: int
    seqlen: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """All calibration tokens."""
        return self.samples * self.seqlen

    @property
    def block(self) -> list[Sublayer]:
        """The sublayers of the first block."""
        return [s for s in self.sublayers if s.layer == self.sublayers[0].layer]

    @property
    def resident_bytes(self) -> int:
        """What any walk holds: one block, what is in no block, and one state of all tokens."""
        weights = self.outside_parameters + _size(self.block)
        return _IMPORTS_BYTES + (weights + self.tokens * self.width) * self.dtype.itemsize

    def seconds(self, passed: int, products: int) -> float:
        """Return the time of passing tokens through ``passed`` weights, and of ``products``
        multiplications of moments a token."""
        forward = passed / product_rate(self.device, self.dtype)
        return 2 * self.tokens * (forward + products / product_rate(self.device, torch.float32))


def estimate_calibration(work: Workload) -> Estimate:
    """Estimate a calibration from above: a moment is counted for each sublayer, at its smaller
    side, though sublayers that read the same tensor share one."""
    squares, widest = _squares(work.sublayers), max(max(s.shape) for s in work.block)
    memory = (
        work.resident_bytes
        + (8 + 4) * _squares(work.block)  # sums in float64, and their mean in float32
        + work.batch * work.seqlen * (12 * work.width + 4 * widest) * 4  # one pass's activations
    )
    return Estimate(4 * squares, memory, work.seconds(_size(work.sublayers), squares))


def estimate_gradients(work: Workload, weights: bool) -> Estimate:
    """Estimate the reverse walk that follows a calibration, its forward half done.

    Args:
        work: what it works on; all parameters outside sublayers are counted as the head's.
        weights: whether the weights' gradients are taken too.
    """
    shapes = [s.shape for s in work.sublayers]
    # Forward and backward through every block and the head; a tall weight's gradient is carried
    # to its input once more.
    passed = 2 * _size(work.sublayers) + 3 * work.outside_parameters
    passed += sum(m * n for m, n in shapes if m > n)
    squares = _squares(work.sublayers)
    products = 2 * squares  # H, and of half the text H and G again
    whole = 0
    if weights:
        whole = sum(m * n + m * m + n * n for m, n in shapes)
        products += _size(work.sublayers)
        products += sum(m * n * (m + n) for m, n in shapes) // work.seqlen
    layers = len({s.layer for s in work.sublayers})
    graph = 3 * sum(map(sum, (s.shape for s in work.block))) * work.dtype.itemsize  # of a token
    memory = (
        work.resident_bytes
        + 3 * (8 + 4) * squares // layers
        + 4 * whole // layers
        + work.batch * work.seqlen * graph
    )
    return Estimate(4 * (3 * squares + whole), memory, work.seconds(passed, products))


def estimate_measuring(parameters: int, tokens: int, passes: float, rate: float) -> float:
    """Return the seconds of ``passes`` forward passes over ``tokens`` tokens at ``rate`` FLOP/s."""
    return passes * 2 * parameters * tokens / rate


def estimate_decomposition(sublayers: Sequence[Sublayer]) -> float:
    """Return the seconds that factoring all sublayers takes, spectra included."""
    flops = sum(decomposition_cost(s.shape) for s in sublayers)
    return flops / product_rate(torch.device("cpu"), torch.float64, 512)


def decomposition_cost(shape: tuple[int, int]) -> int:
    """Return the operations, at a product's rate, that spectrum and factors of W take."""
    m, n = shape
    return 2 * _EIGH_FLOPS * min(shape) ** 3 + 4 * m * n * min(shape)


def _squares(sublayers: Sequence[Sublayer]) -> int:
    """Return the entries of a moment of each sublayer, at its smaller side."""
    return sum(min(s.shape) ** 2 for s in sublayers)


def _size(sublayers: Sequence[Sublayer]) -> int:
    return sum(s.shape[0] * s.shape[1] for s in sublayers)
