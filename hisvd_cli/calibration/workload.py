"""What a calibration works on, and how much memory that takes at its peak.

Legend: m outputs and n inputs of a sublayer; L tokens a window; d hidden width. Figures are from
above: a moment is counted for each sublayer, at its smaller side, though sublayers that read the
same tensor share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hisvd_cli.modeling.hidden_states import Place
from hisvd_cli.modeling.sublayers import Sublayer

IMPORTS_BYTES = 420_000_000
"""Resident after importing torch and transformers, and building a model without weights."""
_CONTEXT_BYTES = 500_000_000  # of a GPU's memory, before anything is put there
_DOUBLE, _SINGLE = 8, 4


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak: of the machine's memory, and of the device's own (0 on a CPU)."""

    host: int
    device: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.host + self.device

    def joined(self, other: Peak) -> Peak:
        """Return the peak of work of both kinds, one after the other."""
        return Peak(max(self.host, other.host), max(self.device, other.device))

    def beside(self, other: Peak) -> Peak:
        """Return the peak of work of both kinds at once; what every process takes counts once."""
        device = max(self.device + other.device - _CONTEXT_BYTES, self.device, other.device)
        return Peak(self.host + other.host - IMPORTS_BYTES, device)


@dataclass(frozen=True)
class Workload:
    """What a calibration works on.

    Attributes:
        sublayers: all of them.
        outside_parameters: parameters outside the sublayers: embeddings, norms, head.
        width: d.
        samples: windows of text.
        seqlen: L.
        batch: windows per forward pass.
        dtype: of forward passes.
        device: where they run.
        place: where hidden states live.
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

    @property
    def tokens(self) -> int:
        """All calibration tokens."""
        return self.samples * self.seqlen

    @property
    def block(self) -> list[Sublayer]:
        """The sublayers of the first block."""
        return [s for s in self.sublayers if s.layer == self.sublayers[0].layer]

    @property
    def states_bytes(self) -> int:
        """Hidden states of all tokens."""
        return self.tokens * self.width * self.dtype.itemsize


def calibration_peak(work: Workload) -> Peak:
    """Return the peak of the walk that takes moments."""
    block, size = work.block, work.dtype.itemsize
    largest = max(min(s.shape) ** 2 for s in block)
    sums = _DOUBLE * squares(block) + (_DOUBLE + _SINGLE) * largest  # and a product to be added
    running = size * parameters(block) + sums + _activations(work)
    return _spread(work, max(size * work.outside_parameters, running), _SINGLE * squares(block))


def gradients_peak(work: Workload, weights: bool) -> Peak:
    """Return the peak of the reverse walk that follows, with or without the weights' gradients."""
    block, size = work.block, work.dtype.itemsize
    vocabulary = work.outside_parameters // work.width
    head = size * work.outside_parameters + work.seqlen * vocabulary * (size + 4 * _SINGLE)
    # H, and of half the text H and G again; in doubles, then one after the other in singles.
    moments = 3 * (_DOUBLE + _SINGLE) * squares(block)
    if weights:
        moments += _SINGLE * sum(m * n + m * m + n * n for m, n in (s.shape for s in block))
    graph = 3 * sum(map(sum, (s.shape for s in block))) * size  # of a token
    running = size * parameters(block) + moments + work.batch * work.seqlen * graph
    return _spread(work, max(head, running), moments // 3)


def update_peak(work: Workload) -> Peak:
    """Return the peak of the walk of two models that updates sublayers; factoring comes beside."""
    block, size = work.block, work.dtype.itemsize
    widest = max(s.shape[1] for s in block) ** 2
    # C and G′ of what is fitted and of what is held back, their means, and what solves for K.
    sums = _DOUBLE * 10 * widest
    running = 2 * size * parameters(block) + sums + 2 * _activations(work)
    both = replace(work, samples=2 * work.samples, batch=2 * work.batch)
    factoring = max(_factoring(s, size) for s in block)
    most = max(size * work.outside_parameters, running + factoring)
    return _spread(both, most, _SINGLE * squares(block))


def factoring_peak(sublayers: Sequence[Sublayer], size: int, device: torch.device) -> Peak:
    """Return the peak of computing spectra and factors, a sublayer at a time.

    Args:
        sublayers: all that are factored.
        size: bytes of a number of the weights.
        device: where that runs.
    """
    blocks: dict[int, list[Sublayer]] = {}
    for s in sublayers:
        blocks.setdefault(s.layer, []).append(s)
    # Statistics of a block, and the factors that wait for the rest of it.
    waiting = max(_SINGLE * squares(b) + size * parameters(b) for b in blocks.values())
    working = max(_factoring(s, size) for s in sublayers)
    if device.type == "cpu":
        return Peak(IMPORTS_BYTES + waiting + working)
    return Peak(IMPORTS_BYTES + waiting, _CONTEXT_BYTES + waiting + working)


def _factoring(sublayer: Sublayer, size: int) -> int:
    """Return what factoring one sublayer takes: its weight and two copies in double precision,
    and three squares of its smaller side."""
    (m, n), side = sublayer.shape, min(sublayer.shape)
    return m * n * (size + 3 * _DOUBLE) + 3 * _DOUBLE * side**2


def _activations(work: Workload) -> int:
    """Return what one pass of a block holds: in its own precision three times its widest
    activation and the states around it, and twice the widest in float32 for statistics."""
    widest = max(max(s.shape) for s in work.block)
    own = (3 * widest + 6 * work.width) * work.dtype.itemsize
    return work.batch * work.seqlen * (own + 2 * _SINGLE * widest)


def _spread(work: Workload, running: int, means: int) -> Peak:
    """Return the peak of a walk.

    Args:
        work: what it works on.
        running: what lies where blocks run.
        means: statistics that are read back to the host.
    """
    chunk = work.states_bytes * min(work.batch, work.samples) // work.samples
    kept = chunk if work.place == "file" else work.states_bytes
    if work.device.type == "cpu":
        return Peak(IMPORTS_BYTES + running + kept)
    widest = max(s.shape[0] * s.shape[1] for s in work.block)
    largest = work.dtype.itemsize * max(widest, work.outside_parameters)
    host = IMPORTS_BYTES + means + largest
    device = _CONTEXT_BYTES + running + chunk
    if work.place == "device":
        return Peak(host, device + kept)
    return Peak(host + kept, device)


def on_device(device: torch.device, taken: int) -> Peak:
    """Return the peak of work that takes so much where it runs, and little elsewhere."""
    if device.type == "cpu":
        return Peak(IMPORTS_BYTES + taken)
    return Peak(IMPORTS_BYTES, _CONTEXT_BYTES + taken)


def quantization_peak(work: Workload) -> Peak:
    """Return the peak of rounding a block after the other with the moments of its inputs."""
    block, size = work.block, work.dtype.itemsize
    inputs = {s.shape[1] for s in block}
    # All sublayers may read another input; sums are in doubles, and one is factored beside them.
    moments = _DOUBLE * sum(s.shape[1] ** 2 for s in block) + 4 * _DOUBLE * max(inputs) ** 2
    widest = max(s.shape[0] * s.shape[1] for s in block)
    rounding = 4 * _DOUBLE * widest + size * parameters(block)
    running = size * parameters(block) + moments + rounding + _activations(work)
    return _spread(work, max(size * work.outside_parameters, running), 0)


def squares(sublayers: Sequence[Sublayer]) -> int:
    """Return the entries of a moment of each sublayer, at its smaller side."""
    return sum(min(s.shape) ** 2 for s in sublayers)


def parameters(sublayers: Sequence[Sublayer]) -> int:
    """Return the parameters of sublayers, without biases."""
    return sum(s.shape[0] * s.shape[1] for s in sublayers)
