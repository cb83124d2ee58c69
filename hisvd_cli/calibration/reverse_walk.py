"""Backpropagation block by block: a forward walk that stores block inputs, then a reverse walk.

The loss is the cross-entropy of the language model in nats, summed over all predicted tokens, so
that a token's gradient does not depend on their number and does not underflow. Peak memory is one
block with its statistics, one chunk of sequences, and the gradient of the hidden states.

Legend: S sequences, L tokens each, d hidden width; gradient of the hidden states ``[S, L, d]``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from hisvd_cli.calibration.block_inputs import BlockInputs
from hisvd_cli.calibration.calibrate import STATE_SECONDS, keep_state, linears_of
from hisvd_cli.linalg.moments import AddUp
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.rows import Checkpoints
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import UnsupportedModelError
from hisvd_cli.utils.progress import Reporter

_STATE = "gradient"


class BlockCollector(Protocol):
    """Collects statistics of the linear layers of a block during its backward pass."""

    def summing(self, start: int, count: int) -> AbstractContextManager[None]:
        """Collect while the body runs the chunk of ``count`` sequences from ``start`` on."""
        ...

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of the other processes on the first process."""
        ...


C = TypeVar("C", bound=BlockCollector)


class ReverseWalk:
    """Runs both walks over a model; parts of the forward walk that are stored are reused.

    Several processes share the sequences.

    Args:
        walk: the model.
        tokens: all sequences ``[S, L]``.
        inputs: the stored block inputs.
        partial: folder for the gradient of the hidden states, so that a run can resume.
        reporter: receives progress.
        state_seconds: interval between writes of that gradient.
    """

    def __init__(
        self,
        walk: BlockWalk,
        tokens: Tensor,
        inputs: BlockInputs,
        partial: Path,
        reporter: Reporter,
        state_seconds: float = STATE_SECONDS,
    ) -> None:
        self.walk = walk
        self.inputs = inputs
        self.state = Checkpoints(partial, _STATE, len(tokens))
        self.sublayers: list[Sublayer] = find_sublayers(walk.prefix, list(walk.layers))
        self._total = len(tokens)
        rows = world().share(self._total)
        self._start = rows.start  # the first sequence of this process
        self._tokens = tokens[rows.start : rows.stop]
        self._state_seconds = state_seconds
        self._reporter = reporter

    def run(
        self,
        is_done: Callable[[int], bool],
        watch: Callable[[int, Mapping[str, nn.Linear]], C],
        write: Callable[[int, C], None],
    ) -> None:
        """Collect the statistics of every missing block, from the last to the first.

        Args:
            is_done: returns whether the statistics of a block are on disk.
            watch: returns the collector for the linear layers of a block (by name).
            write: writes the statistics of a block; called on the first process.

        Raises:
            SourceError: weights or stored block inputs are missing or damaged.
            NumericalError: the loss or a gradient is not finite.
            OutputError: files cannot be written.
        """
        here, count = world(), len(self.walk.layers)
        left = here.agreed(lambda: [i for i in range(count) if not is_done(i)])
        if not left:
            return
        self._forward(count)
        gradient, start = self._first_gradient(count, left[-1])
        saved = time.monotonic()
        with self._reporter.stage("Gradients of blocks", count) as step:
            for _ in range(start + 1, count):
                step()
            for index in range(start, left[0] - 1, -1):
                watcher = self._reverse_block(index, gradient, watch)
                if index in left:
                    watcher.pool(here.add_up)
                    if here.first:
                        write(index, watcher)
                due = time.monotonic() - saved >= self._state_seconds and index > 0
                if here.agreed(lambda due=due: due):  # type: ignore[misc]
                    keep_state(self.state, index - 1, gradient, self.walk.home)
                    saved = time.monotonic()
                step()

    def names(self, index: int) -> list[str]:
        """Return the names of the linear layers of a block."""
        return [name for s in self.sublayers if s.layer == index for name in s.members]

    def _forward(self, count: int) -> None:
        """Store the inputs of all blocks, from the first missing one on."""
        first = world().agreed(
            lambda: next((i for i in range(count + 1) if not self.inputs.has(i, self._total)), None)
        )
        self.walk.embed(self._tokens, compute_hidden=first == 0)
        if self.walk.carries:
            raise UnsupportedModelError(
                f"The blocks of {type(self.walk.model).__name__} share keys and values, so that "
                "gradients cannot be computed block by block.",
                "Choose a preset without gradients, such as `hisvd`.",
            )
        if first is None:
            return
        if first > 0:
            end = self._start + len(self._tokens)
            self.walk.hidden = self.inputs.load(first - 1, self._start, end, self.walk.home)
        else:
            self.inputs.keep(0, self._start, self.walk.hidden, self.walk.home)
        with self._reporter.stage("Running blocks", count) as step:
            for index in range(count):
                if index >= first - 1:
                    self.walk.load(index)
                    self.walk.advance(index)
                    self.walk.free(index)
                    self.inputs.keep(index + 1, self._start, self.walk.hidden, self.walk.home)
                step()
        self.walk.hidden = torch.empty(0)

    def _first_gradient(self, count: int, last: int) -> tuple[Tensor, int]:
        """Return the gradient at the output of the first block to process (``last`` or above), and
        its index."""
        home = self.walk.home
        kept = [block for block in world().agreed(self.state.blocks) if block >= last]
        if kept:
            end = self._start + len(self._tokens)
            return self.state.at(kept[0]).load(self._start, end, home), kept[0]
        with self._reporter.stage("Gradient of the loss", len(self._tokens)) as step:
            gradient = torch.empty(0)
            with self.walk.whole_outside():
                for i, ids in enumerate(self._tokens):
                    number = self._start + i
                    state = self.inputs.part(count, number, number + 1)
                    row = self.walk.loss_gradient(ids[None], state)
                    if i == 0:
                        gradient = home.take((len(self._tokens), *row.shape[1:]), row.dtype)
                    gradient[i : i + 1] = row
                    home.settle()
                    step()
        return gradient, count - 1

    def _reverse_block(
        self,
        index: int,
        gradient: Tensor,
        watch: Callable[[int, Mapping[str, nn.Linear]], C],
    ) -> C:
        """Propagate the gradient ``[S, L, d]`` from the output to the input of a block, in place;
        return the collector of its layers."""
        self.walk.load(index)
        watcher = watch(index, linears_of(self.walk, self.names(index)))
        for start in range(0, len(gradient), self.walk.batch):
            part = gradient[start : start + self.walk.batch]
            number = self._start + start
            state = self.inputs.part(index, number, number + len(part))
            with watcher.summing(number, len(part)):
                part.copy_(self.walk.reverse(index, start, state, part))
            self.walk.home.settle()
        self.walk.free(index)
        return watcher
