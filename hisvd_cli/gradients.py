"""Gradients of the loss at every sublayer, block by block: a forward walk that keeps what enters
each block on disk, then a reverse walk that carries the hidden states' gradient down.

The loss is the causal language model's cross-entropy in nats, summed over all predicted tokens:
so a token's gradient does not depend on how many there are, and nothing underflows. Memory is one
block, its statistics, one chunk of sequences, and the hidden states' gradient.

Legend: S sequences, L tokens each, d hidden width; gradient of the hidden states ``[S, L, d]``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.block_inputs import INPUTS, BlockInputs
from hisvd_cli.blocks import BlockWalk
from hisvd_cli.calibrate import STATE_SECONDS, keep_state, linears_of
from hisvd_cli.calibration import (
    FORMAT_VERSION,
    GRADIENTS,
    GRADIENTS_MANIFEST,
    Calibration,
    Sample,
    block_file,
    open_calibration,
    weights_file,
)
from hisvd_cli.distributed import building_together, world
from hisvd_cli.errors import NumericalError
from hisvd_cli.gradient_collector import GradientCollector
from hisvd_cli.hidden_states import Place, StatesHome
from hisvd_cli.paths import digest
from hisvd_cli.reporter import Reporter
from hisvd_cli.rows import Checkpoints
from hisvd_cli.source import Source
from hisvd_cli.sublayers import Sublayer, find_sublayers
from hisvd_cli.tensorfile import write_json, write_tensors
from hisvd_cli.versions import versions

_STATE = "gradient"


def measure_gradients(
    source: Source,
    sample: Sample,
    calibration: Calibration,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    weights: bool,
    settings: Mapping[str, object],
    reporter: Reporter,
    state_seconds: float = STATE_SECONDS,
    place: Place = "device",
) -> Calibration:
    """Add to a calibration the gradients of the loss on its own tokens.

    A run that was interrupted goes on after its last finished block.

    Args:
        source: the model.
        sample: the calibration's tokens.
        calibration: where the gradients go, into a folder of its own.
        device: where blocks run.
        dtype: in which blocks run; float16, whose range gradients leave, means float32 here.
        batch: sequences per chunk.
        weights: also take the gradients of the weights, per sequence.
        settings: the resolved settings, recorded as they are.
        reporter: told of each block.
        state_seconds: how often the carried gradient is stored for a resumed run.
        place: where hidden states, and their gradient, live.

    Returns:
        The calibration with its gradients.

    Raises:
        SourceError, NumericalError, OutputError: see each.
    """
    precise = torch.float32 if dtype == torch.float16 else dtype
    key = digest(str(FORMAT_VERSION), calibration.key, str(precise), str(weights))
    with building_together(calibration.folder / GRADIENTS, key) as partial:
        walk = BlockWalk(source, device, precise, batch, StatesHome(device, place, partial))
        reverse = _Reverse(walk, calibration, sample, partial, weights, state_seconds, reporter)
        reverse.run()
        manifest = {
            "kind": "gradients",
            "format_version": FORMAT_VERSION,
            "key": key,
            "calibration": calibration.key,
            "weights": weights,
            "dtype": str(precise).removeprefix("torch."),
            "settings": settings,
            "versions": versions(),
        }
        if world().first:
            reverse.state.remove()
            write_json(partial / GRADIENTS_MANIFEST, manifest)
    if world().first:
        reverse.inputs.remove()
    return open_calibration(calibration.folder)


class _Reverse:
    """Both walks over one model: the forward one as far as it is not done, then the reverse."""

    def __init__(
        self,
        walk: BlockWalk,
        calibration: Calibration,
        sample: Sample,
        partial: Path,
        weights: bool,
        state_seconds: float,
        reporter: Reporter,
    ) -> None:
        self.walk = walk
        self.calibration = calibration
        self.inputs = BlockInputs(calibration.folder / INPUTS)
        self.total = len(sample.tokens)
        rows = world().share(self.total)
        self.start = rows.start  # the first sequence of this process
        self.tokens = sample.tokens[rows.start : rows.stop]
        self.state = Checkpoints(partial, _STATE, self.total)
        self.partial = partial
        self.weights = weights
        self.state_seconds = state_seconds
        self.reporter = reporter
        self.count = len(walk.layers)
        self.left: list[int] = []
        self.sublayers: list[Sublayer] = find_sublayers(walk.prefix, list(walk.layers))

    def run(self) -> None:
        """Write the gradients of every block."""
        here = world()
        self.left = here.agreed(lambda: [i for i in range(self.count) if not self._is_done(i)])
        if not self.left:
            return
        self._forward()
        gradient, start = self._first_gradient()
        saved = time.monotonic()
        with self.reporter.stage("Gradients of blocks", self.count) as step:
            for _ in range(start + 1, self.count):
                step()
            for index in range(start, self.left[0] - 1, -1):
                self._reverse_block(index, gradient)
                due = time.monotonic() - saved >= self.state_seconds and index > 0
                if here.agreed(lambda due=due: due):  # type: ignore[misc]
                    keep_state(self.state, index - 1, gradient, self.walk.home)
                    saved = time.monotonic()
                step()

    def _is_done(self, index: int) -> bool:
        files = [block_file(index), *([weights_file(index)] if self.weights else [])]
        return all((self.partial / file).is_file() for file in files)

    def _forward(self) -> None:
        """Complete the inputs of all blocks, from the first that is missing."""
        first = world().agreed(
            lambda: next(
                (i for i in range(self.count + 1) if not self.inputs.has(i, self.total)), None
            )
        )
        self.walk.embed(self.tokens, compute_hidden=first == 0)
        if first is None:
            return
        if first > 0:
            end = self.start + len(self.tokens)
            self.walk.hidden = self.inputs.load(first - 1, self.start, end, self.walk.home)
        else:
            self.inputs.keep(0, self.start, self.walk.hidden, self.walk.home)
        with self.reporter.stage("Running blocks", self.count) as step:
            for index in range(self.count):
                if index >= first - 1:
                    self.walk.load(index)
                    self.walk.advance(index)
                    self.walk.free(index)
                    self.inputs.keep(index + 1, self.start, self.walk.hidden, self.walk.home)
                step()
        self.walk.hidden = torch.empty(0)

    def _first_gradient(self) -> tuple[Tensor, int]:
        """Return the gradient at the output of a block, and the block."""
        home = self.walk.home
        if kept := world().agreed(self.state.blocks):
            hint = f"Remove {self.partial} and run again."
            end = self.start + len(self.tokens)
            return self.state.at(kept[0]).load(self.start, end, home, hint), kept[0]
        with self.reporter.stage("Gradient of the loss", len(self.tokens)) as step:
            gradient = torch.empty(0)
            with self.walk.whole_outside():
                for i, ids in enumerate(self.tokens):
                    number = self.start + i
                    state = self.inputs.part(self.count, number, number + 1)
                    row = self.walk.loss_gradient(ids[None], state)
                    if i == 0:
                        gradient = home.take((len(self.tokens), *row.shape[1:]), row.dtype)
                    gradient[i : i + 1] = row
                    home.settle()
                    step()
        return gradient, self.count - 1

    def _reverse_block(self, index: int, gradient: Tensor) -> None:
        """Carry the gradient ``[S, L, d]`` from a block's output to its input, in place, and write
        what its linears see on the way."""
        names = [s.name for s in self.sublayers if s.layer == index]
        self.walk.load(index)
        collector = GradientCollector(
            linears_of(self.walk, names),
            self.walk.device,
            keys=self.calibration.moment_keys(index),
            seqlen=self.tokens.shape[1],
            weights=self.weights,
        )
        for start in range(0, len(gradient), self.walk.batch):
            part = gradient[start : start + self.walk.batch]
            number = self.start + start
            state = self.inputs.part(index, number, number + len(part))
            with collector.summing(number):
                part.copy_(self.walk.reverse(index, state, part))
            self.walk.home.settle()
        self.walk.free(index)
        if index in self.left:
            collector.pool(world().add_up)
            if world().first:
                self._write(index, names, collector)

    def _write(self, index: int, names: Sequence[str], collector: GradientCollector) -> None:
        means = collector.means()
        for name in names:
            found = means[f"{name}.square"]
            if not bool(found.isfinite()):
                raise NumericalError(
                    f"The gradient at the output of {name} is NaN or infinite.",
                    "Calibrate with --dtype float32, or on other text.",
                )
            if not bool(found):
                self.reporter.warn(
                    f"The gradient at the output of {name} is zero: the loss does not depend on it."
                )
        if self.weights:
            write_tensors(self.partial / weights_file(index), collector.weight_means(), {})
        write_tensors(self.partial / block_file(index), means, {})
