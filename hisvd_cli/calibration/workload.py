"""Estimates of peak memory.

Legend: m outputs and n inputs of a layer; L tokens per window; d hidden width. Estimates are upper
bounds: every layer counts with a moment on its smaller side, although layers with a common input
share one. All E experts of a stack have weights and moments in memory together; a token passes k of
them, and one at a time is factorized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hisvd_cli.modeling.hidden_states import Place
from hisvd_cli.modeling.layers.shapes import copies, copies_used, is_stack, matrix_of, numel
from hisvd_cli.modeling.structure.sublayers import Sublayer

IMPORTS_BYTES = 420_000_000
"""Resident memory after importing torch and transformers and building a model without weights."""
_CONTEXT_BYTES = 500_000_000  # GPU memory of an empty context
_DOUBLE, _SINGLE = 8, 4


@dataclass(frozen=True)
class Peak:
    """Peak memory in bytes, of the host and of the device (0 for a CPU)."""

    host: int
    device: int = 0

    @property
    def total(self) -> int:
        """Host and device memory together."""
        return self.host + self.device

    def joined(self, other: Peak) -> Peak:
        """Return the peak of both kinds of work, one after the other."""
        return Peak(max(self.host, other.host), max(self.device, other.device))

    def beside(self, other: Peak) -> Peak:
        """Return the peak of both kinds of work at the same time; fixed overhead counts once."""
        device = max(self.device + other.device - _CONTEXT_BYTES, self.device, other.device)
        return Peak(self.host + other.host - IMPORTS_BYTES, device)


@dataclass(frozen=True)
class Workload:
    """The model and the text of a calibration.

    Attributes:
        sublayers: all linear layers.
        outside_parameters: parameters outside of them: embeddings, norms, head.
        width: d.
        samples: number of windows.
        seqlen: L.
        batch: windows per forward pass.
        dtype: dtype of forward passes.
        device: where they run.
        place: where hidden states are kept.
        experts_per_token: k; None if unknown, which counts all experts.
    """

    sublayers: Sequence[Sublayer]
    outside_parameters: int
    width: int
    samples: int
    seqlen: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    place: Place = "device"
    experts_per_token: int | None = None

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.samples * self.seqlen

    @property
    def block(self) -> list[Sublayer]:
        """The linear layers of the first block."""
        return [s for s in self.sublayers if s.layer == self.sublayers[0].layer]

    @property
    def states_bytes(self) -> int:
        """Bytes of the hidden states of all tokens."""
        return self.tokens * self.width * self.dtype.itemsize


def calibration_peak(work: Workload) -> Peak:
    """Return the peak of collecting moments."""
    block, size = work.block, work.dtype.itemsize
    largest = max(min(matrix_of(s.shape)) ** 2 for s in block)
    sums = _DOUBLE * squares(block) + (_DOUBLE + _SINGLE) * largest  # with one product
    running = size * parameters(block) + sums + _activations(work)
    return _spread(work, max(size * work.outside_parameters, running), _SINGLE * squares(block))


def gradients_peak(work: Workload, weights: bool) -> Peak:
    """Return the peak of the reverse walk, with or without weight gradients."""
    block, size = work.block, work.dtype.itemsize
    vocabulary = work.outside_parameters // work.width
    head = size * work.outside_parameters + work.seqlen * vocabulary * (size + 4 * _SINGLE)
    # H, and H and G of half the text, in float64, and one at a time in float32.
    moments = 3 * (_DOUBLE + _SINGLE) * squares(block)
    if weights:
        moments += _SINGLE * sum(copies(s.shape) * with_sides(s) for s in block)
    graph = 3 * activations(block, work.experts_per_token) * size  # per token
    running = size * parameters(block) + moments + work.batch * work.seqlen * graph
    return _spread(work, max(head, running), moments // 3)


def update_peak(work: Workload) -> Peak:
    """Return the peak of the paired walk that updates layers, with their factorization."""
    block, size = work.block, work.dtype.itemsize
    widest = max(copies(s.shape) * matrix_of(s.shape)[1] ** 2 for s in block)
    # C and G′ of the fitting and the held-out part, their means, and the solver of K.
    sums = _DOUBLE * 10 * widest
    running = 2 * size * parameters(block) + sums + 2 * _activations(work)
    both = replace(work, samples=2 * work.samples, batch=2 * work.batch)
    factoring = max(_factoring(s, size) for s in block)
    most = max(size * work.outside_parameters, running + factoring)
    return _spread(both, most, _SINGLE * squares(block))


def factoring_peak(sublayers: Sequence[Sublayer], size: int, device: torch.device) -> Peak:
    """Return the peak of computing spectra and factors, one layer at a time.

    Args:
        sublayers: the layers to factorize.
        size: bytes per weight.
        device: where factorization runs.
    """
    blocks: dict[int, list[Sublayer]] = {}
    for s in sublayers:
        blocks.setdefault(s.layer, []).append(s)
    # Statistics of a block, and its completed factors.
    waiting = max(_SINGLE * squares(b) + size * parameters(b) for b in blocks.values())
    working = max(_factoring(s, size) for s in sublayers)
    if device.type == "cpu":
        return Peak(IMPORTS_BYTES + waiting + working)
    return Peak(IMPORTS_BYTES + waiting, _CONTEXT_BYTES + waiting + working)


def _factoring(sublayer: Sublayer, size: int) -> int:
    """Return the bytes for factorizing one layer or expert: the weight, copies in float64, and
    three square matrices of its smaller side."""
    m, n = matrix_of(sublayer.shape)
    return m * n * (size + 3 * _DOUBLE) + 3 * _DOUBLE * min(m, n) ** 2


def _activations(work: Workload) -> int:
    """Return the bytes of one forward pass of a block: three of its widest activations and the
    states around them in ``dtype``, and two of the widest in float32 for statistics."""
    widest = max(
        max(matrix_of(s.shape)) * copies_used(s.shape, work.experts_per_token) for s in work.block
    )
    own = (3 * widest + 6 * work.width) * work.dtype.itemsize
    return work.batch * work.seqlen * (own + 2 * _SINGLE * widest)


def _spread(work: Workload, running: int, means: int) -> Peak:
    """Return the peak of a walk.

    Args:
        work: the model and the text.
        running: bytes where blocks run.
        means: bytes of statistics that are copied back to the host.
    """
    chunk = work.states_bytes * min(work.batch, work.samples) // work.samples
    kept = chunk if work.place == "file" else work.states_bytes
    if work.device.type == "cpu":
        return Peak(IMPORTS_BYTES + running + kept)
    widest = max(numel(s.shape) for s in work.block)
    largest = work.dtype.itemsize * max(widest, work.outside_parameters)
    host = IMPORTS_BYTES + means + largest
    device = _CONTEXT_BYTES + running + chunk
    if work.place == "device":
        return Peak(host, device + kept)
    return Peak(host + kept, device)


def on_device(device: torch.device, taken: int) -> Peak:
    """Return the peak of work that takes ``taken`` bytes where it runs."""
    if device.type == "cpu":
        return Peak(IMPORTS_BYTES + taken)
    return Peak(IMPORTS_BYTES, _CONTEXT_BYTES + taken)


def quantization_peak(work: Workload) -> Peak:
    """Return the peak of quantizing block by block with the moments of inputs (GPTQ)."""
    block, size = work.block, work.dtype.itemsize
    rounded = [matrix_of(s.shape) for s in block if not is_stack(s.shape)]
    inputs = [n**2 for _, n in rounded]
    # All layers may have different inputs; sums are in float64, and one is factorized.
    moments = _DOUBLE * sum(inputs) + 4 * _DOUBLE * max(inputs, default=0)
    widest = max((m * n for m, n in rounded), default=0)
    rounding = 4 * _DOUBLE * widest + size * parameters(block)
    running = size * parameters(block) + moments + rounding + _activations(work)
    return _spread(work, max(size * work.outside_parameters, running), 0)


def squares(sublayers: Sequence[Sublayer]) -> int:
    """Return the number of entries of the moments of layers, each on its smaller side."""
    return sum(copies(s.shape) * min(matrix_of(s.shape)) ** 2 for s in sublayers)


def with_sides(sublayer: Sublayer) -> int:
    """Return ``mn + m² + n²`` of a layer or one expert, the entries of a weight gradient and both
    moments."""
    m, n = matrix_of(sublayer.shape)
    return m * n + m * m + n * n


def parameters(sublayers: Sequence[Sublayer]) -> int:
    """Return the number of parameters of layers, without biases."""
    return sum(numel(s.shape) for s in sublayers)


def activations(sublayers: Sequence[Sublayer], experts_per_token: int | None) -> int:
    """Return the inputs and outputs of layers for one token."""
    return sum(copies_used(s.shape, experts_per_token) * sum(matrix_of(s.shape)) for s in sublayers)
