"""How much memory work takes at its peak that holds a whole model, not a block of it.

Legend: L tokens of a window, S windows, d hidden width, V vocabulary; m outputs, n inputs and r the
rank of a sublayer. Figures are from above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hisvd_cli.calibration.workload import Peak, factoring_peak, on_device, parameters
from hisvd_cli.modeling.sublayers import Sublayer

_SINGLE, _DOUBLE = 4, 8
_LOADING_BYTES = 20_000_000  # what loads models, and what an allocator keeps of that
_PROBED_ROWS = 512  # positions whose distributions a probe compares at a time
_TRAINED_ROWS = 256  # the same of a recovery
_SAMPLED_ROWS = 16  # rows of text that a model writes together


@dataclass(frozen=True)
class WholeModel:
    """A model that is loaded whole.

    Attributes:
        sublayers: all of them.
        parameters: of the whole model.
        stored_bytes: of its weights on disk, which are mapped while they are loaded.
        width: d.
        vocabulary: V.
        dtype: in which it runs, and is held.
        device: where.
    """

    sublayers: Sequence[Sublayer]
    parameters: int
    stored_bytes: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return 1 + max(s.layer for s in self.sublayers)

    @property
    def loaded(self) -> int:
        """Weights in memory, the pages of their files on a CPU, and what loads them."""
        pages = self.stored_bytes if self.device.type == "cpu" else 0
        return self.parameters * self.dtype.itemsize + pages + _LOADING_BYTES

    @property
    def head(self) -> int:
        """Weights outside the sublayers."""
        return (self.parameters - parameters(self.sublayers)) * self.dtype.itemsize

    def activations(self, tokens: int, kept: bool) -> int:
        """Return what tokens take that go through all blocks: with what a backward pass needs
        (``kept``), or one block after the other."""
        wide = 3 * sum(map(sum, (s.shape for s in self.sublayers)))
        each = wide if kept else wide // self.blocks
        return tokens * (each + 6 * self.width) * self.dtype.itemsize

    def logits(self, tokens: int, singles: int) -> int:
        """Return what logits of tokens take, and so many copies of them in float32."""
        return tokens * self.vocabulary * (self.dtype.itemsize + singles * _SINGLE)


def evaluation_peak(model: WholeModel, batch: int, seqlen: int, baseline: int = 0) -> Peak:
    """Return the peak of measuring windows, a batch at a time, beside ``baseline`` bytes."""
    tokens = batch * seqlen
    passing = model.activations(tokens, kept=False) + model.logits(tokens, 0)
    beside = 2 if baseline else 1
    measuring = beside * model.logits(seqlen, 3)
    return on_device(model.device, model.loaded + passing + measuring + baseline)


def writing_peak(model: WholeModel, seqlen: int) -> Peak:
    """Return the peak of a model that writes text."""
    cache = 2 * _SAMPLED_ROWS * seqlen * model.blocks * model.width * model.dtype.itemsize
    passing = model.activations(_SAMPLED_ROWS, kept=False) + model.logits(_SAMPLED_ROWS, 4)
    return on_device(model.device, model.loaded + 2 * cache + passing)


def probing_peak(model: WholeModel, samples: int, seqlen: int, exact: torch.device) -> Peak:
    """Return the peak of measuring what one truncated sublayer does.

    Args:
        model: the dense model.
        samples: S.
        seqlen: L.
        exact: where factors are made.
    """
    size = model.dtype.itemsize
    entered = (model.blocks + 1) * samples * seqlen * model.width * size
    widest = max(s.shape[0] * s.shape[1] for s in model.sublayers)
    passing = model.activations(seqlen, kept=False) + model.logits(2 * seqlen, 0)
    comparing = model.logits(min(_PROBED_ROWS, seqlen), 6) + _DOUBLE * 2 * widest
    running = on_device(model.device, model.loaded + entered + passing + comparing)
    return running.beside(factoring_peak(model.sublayers, size, exact))


def learning_peak(model: WholeModel, samples: int, seqlen: int, exact: torch.device) -> Peak:
    """Return the peak of learning where to truncate: all factors, and a backward pass through them;
    arguments as of :func:`probing_peak`."""
    size = model.dtype.itemsize
    shapes = [s.shape for s in model.sublayers]
    factors = sum(min(shape) * sum(shape) for shape in shapes) * size
    hidden = 3 * seqlen * sum(map(min, shapes)) * size
    graph = model.activations(seqlen, kept=True) + hidden + model.logits(seqlen, 6)
    more = on_device(model.device, factors + graph)
    return probing_peak(model, samples, seqlen, exact).beside(more)


@dataclass(frozen=True)
class Training:
    """What a recovery trains.

    Attributes:
        trained: numbers in the low-rank factors.
        adapters: numbers in adapters of them; 0 where the factors themselves are trained.
        tokens: that pass the model together.
        seqlen: of a window.
        checkpointing: activations are made again in the backward pass.
    """

    trained: int
    adapters: int
    tokens: int
    seqlen: int
    checkpointing: bool


def training_peak(student: WholeModel, teacher: WholeModel | None, work: Training) -> Peak:
    """Return the peak of a recovery: factors in float32, what is trained with its gradient, both
    moments of the optimizer and its best state, and the dense model where it teaches."""
    moving = work.adapters or work.trained
    # The factors as they are loaded count in the student; casts of them are for narrow products.
    held = student.loaded + _SINGLE * work.trained + 2 * work.trained + 4 * _SINGLE * moving
    passing = student.activations(work.tokens, kept=not work.checkpointing)
    if work.checkpointing:
        states = student.blocks * work.tokens * student.width * student.dtype.itemsize
        passing = states + student.activations(work.tokens // student.blocks + 1, kept=True)
    if work.adapters:  # dropout keeps its result and its mask for each input
        inputs = sum(s.shape[1] for s in student.sublayers) * (student.dtype.itemsize + 1)
        passing += work.tokens * inputs // (student.blocks if work.checkpointing else 1)
    taught = 2 if teacher else 1
    judging = taught * max(student.logits(work.seqlen, 4), student.logits(_TRAINED_ROWS, 6))
    second = 0
    if teacher:
        second = teacher.loaded + work.tokens * teacher.width * 2 * teacher.dtype.itemsize
    return on_device(student.device, held + passing + judging + second)


def streaming_peak(model: WholeModel, batch: int, seqlen: int, baseline: int = 0) -> Peak:
    """Return the peak of measuring windows with one block in memory, but for the hidden states of
    more than a batch; arguments as of :func:`evaluation_peak`."""
    size, tokens = model.dtype.itemsize, batch * seqlen
    block = parameters([s for s in model.sublayers if s.layer == model.sublayers[0].layer])
    # What is outside the blocks is read from its file at once, and cast.
    weights = max(2 * size * block, 2 * model.head) + model.head
    passing = model.activations(tokens, kept=False) + model.logits(tokens, 0)
    measuring = (2 if baseline else 1) * model.logits(seqlen, 3)
    states = tokens * model.width * size
    return on_device(model.device, weights + passing + measuring + 2 * states + baseline)
