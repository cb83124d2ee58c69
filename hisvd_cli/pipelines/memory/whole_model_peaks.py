"""Peak memory of work with a whole model in memory, estimated from above.

Symbols: L tokens per window, S windows, d hidden size, V vocabulary size; m outputs, n inputs and r
rank of a sublayer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hisvd_cli.allocation.budget import full_rank
from hisvd_cli.calibration.workload import (
    Peak,
    activations,
    factoring_peak,
    on_device,
    parameters,
)
from hisvd_cli.modeling.layers.shapes import copies, copies_used, matrix_of, numel
from hisvd_cli.modeling.structure.sublayers import Sublayer

_SINGLE, _DOUBLE = 4, 8
_LOADING_BYTES = 20_000_000  # libraries for loading, and memory the allocator keeps
_PROBED_ROWS = 512  # positions that a probe compares at a time
_TRAINED_ROWS = 256  # the same for a recovery
_SAMPLED_ROWS = 16  # windows that a model generates together


@dataclass(frozen=True)
class WholeModel:
    """A model that is loaded as a whole.

    Attributes:
        sublayers: all sublayers.
        parameters: parameters of the whole model.
        stored_bytes: bytes of the weights on disk, which are memory-mapped during loading.
        width: d.
        vocabulary: V.
        dtype: dtype of the weights and of the passes.
        device: device of the model.
        experts_per_token: experts of a stack that one token passes; None if unknown.
    """

    sublayers: Sequence[Sublayer]
    parameters: int
    stored_bytes: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    experts_per_token: int | None = None

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return 1 + max(s.layer for s in self.sublayers)

    @property
    def loaded(self) -> int:
        """Bytes of the weights in memory, of file pages on a CPU, and of loading."""
        pages = self.stored_bytes if self.device.type == "cpu" else 0
        return self.parameters * self.dtype.itemsize + pages + _LOADING_BYTES

    @property
    def head(self) -> int:
        """Bytes of the weights outside the sublayers."""
        return (self.parameters - parameters(self.sublayers)) * self.dtype.itemsize

    @property
    def sides(self) -> int:
        """The sum of m + n over all linear layers and experts."""
        return sum(copies(s.shape) * sum(matrix_of(s.shape)) for s in self.sublayers)

    def activations(self, tokens: int, kept: bool) -> int:
        """Return the bytes of activations of all blocks, kept for a backward pass (``kept``), or of
        one block at a time."""
        wide = 3 * activations(self.sublayers, self.experts_per_token)
        each = wide if kept else wide // self.blocks
        return tokens * (each + 6 * self.width) * self.dtype.itemsize

    def logits(self, tokens: int, singles: int) -> int:
        """Return the bytes of the logits of tokens, plus ``singles`` copies in float32."""
        return tokens * self.vocabulary * (self.dtype.itemsize + singles * _SINGLE)


def evaluation_peak(model: WholeModel, batch: int, seqlen: int, baseline: int = 0) -> Peak:
    """Return the peak of evaluating one batch at a time, plus ``baseline`` bytes."""
    tokens = batch * seqlen
    passing = model.activations(tokens, kept=False) + model.logits(tokens, 0)
    beside = 2 if baseline else 1
    measuring = beside * model.logits(seqlen, 3)
    return on_device(model.device, model.loaded + passing + measuring + baseline)


def writing_peak(model: WholeModel, seqlen: int) -> Peak:
    """Return the peak of generating text."""
    cache = 2 * _SAMPLED_ROWS * seqlen * model.blocks * model.width * model.dtype.itemsize
    passing = model.activations(_SAMPLED_ROWS, kept=False) + model.logits(_SAMPLED_ROWS, 4)
    return on_device(model.device, model.loaded + 2 * cache + passing)


def probing_peak(model: WholeModel, samples: int, seqlen: int, exact: torch.device) -> Peak:
    """Return the peak of measuring the effect of truncating single sublayers.

    Args:
        model: the dense model.
        samples: S.
        seqlen: L.
        exact: device of the decompositions.
    """
    size = model.dtype.itemsize
    entered = (model.blocks + 1) * samples * seqlen * model.width * size
    widest = max(numel(s.shape) for s in model.sublayers)
    passing = model.activations(seqlen, kept=False) + model.logits(2 * seqlen, 0)
    comparing = model.logits(min(_PROBED_ROWS, seqlen), 6) + _DOUBLE * 2 * widest
    running = on_device(model.device, model.loaded + entered + passing + comparing)
    return running.beside(factoring_peak(model.sublayers, size, exact))


def learning_peak(model: WholeModel, samples: int, seqlen: int, exact: torch.device) -> Peak:
    """Return the peak of learning ranks: all factors, and a backward pass through them; arguments
    as for :func:`probing_peak`."""
    size = model.dtype.itemsize
    whole = [(full_rank(s.shape), s.shape) for s in model.sublayers]
    factors = sum(rank * sum(matrix_of(s)) * copies(s) for rank, s in whole) * size
    used = sum(rank * copies_used(s, model.experts_per_token) for rank, s in whole)
    hidden = 3 * seqlen * used * size
    graph = model.activations(seqlen, kept=True) + hidden + model.logits(seqlen, 6)
    more = on_device(model.device, factors + graph)
    return probing_peak(model, samples, seqlen, exact).beside(more)


@dataclass(frozen=True)
class Training:
    """The workload of a recovery.

    Attributes:
        trained: parameters of the low-rank factors.
        adapters: parameters of their adapters; 0 if the factors themselves are trained.
        tokens: tokens per pass.
        seqlen: tokens per window.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    trained: int
    adapters: int
    tokens: int
    seqlen: int
    checkpointing: bool


def training_peak(student: WholeModel, teacher: WholeModel | None, work: Training) -> Peak:
    """Return the peak of a recovery: factors in float32, trained parameters with gradient, both
    optimizer moments and best state, and the teacher if there is one."""
    moving = work.adapters or work.trained
    # The loaded factors are part of the student; their casts are for products in its dtype.
    held = student.loaded + _SINGLE * work.trained + 2 * work.trained + 4 * _SINGLE * moving
    passing = student.activations(work.tokens, kept=not work.checkpointing)
    if work.checkpointing:
        states = student.blocks * work.tokens * student.width * student.dtype.itemsize
        passing = states + student.activations(work.tokens // student.blocks + 1, kept=True)
    if work.adapters:  # dropout keeps a result and a mask for each input
        inputs = sum(
            matrix_of(s.shape)[1] * copies_used(s.shape, student.experts_per_token)
            for s in student.sublayers
        ) * (student.dtype.itemsize + 1)
        passing += work.tokens * inputs // (student.blocks if work.checkpointing else 1)
    taught = 2 if teacher else 1
    judging = taught * max(student.logits(work.seqlen, 4), student.logits(_TRAINED_ROWS, 6))
    second = 0
    if teacher:
        second = teacher.loaded + work.tokens * teacher.width * 2 * teacher.dtype.itemsize
    return on_device(student.device, held + passing + judging + second)


def streaming_peak(model: WholeModel, batch: int, seqlen: int, baseline: int = 0) -> Peak:
    """Return the peak of evaluating with one block in memory, without the hidden states of other
    batches; arguments as for :func:`evaluation_peak`."""
    size, tokens = model.dtype.itemsize, batch * seqlen
    block = parameters([s for s in model.sublayers if s.layer == model.sublayers[0].layer])
    # Weights outside the blocks are read at once and cast.
    weights = max(2 * size * block, 2 * model.head) + model.head
    passing = model.activations(tokens, kept=False) + model.logits(tokens, 0)
    measuring = (2 if baseline else 1) * model.logits(seqlen, 3)
    states = tokens * model.width * size
    return on_device(model.device, weights + passing + measuring + 2 * states + baseline)
