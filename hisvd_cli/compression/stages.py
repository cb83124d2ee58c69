"""Corrects a truncated model between two truncations, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.block_inputs import INPUTS, BlockInputs
from hisvd_cli.calibration.calibrate import STATE_SECONDS
from hisvd_cli.calibration.gradient_collector import BatchGradients
from hisvd_cli.calibration.reverse_walk import ReverseWalk
from hisvd_cli.calibration.statistics_files import block_file
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.corrected import corrected
from hisvd_cli.modeling.hidden_states import Place, StatesHome
from hisvd_cli.modeling.layers.lowrank import FACTORS, dense_product
from hisvd_cli.modeling.layers.shapes import is_stack
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.distributed import building_together, world
from hisvd_cli.utils.errors import NumericalError
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.tensorfile import write_tensors
from hisvd_cli.utils.progress import Reporter

Step = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""(Δ, gradients of batches) → correction of the truncated weight, all ``[m, n]``."""
_KEY = "stage"  # of folders inside a folder that has its own key


@dataclass(frozen=True)
class Truncated:
    """A truncated model and its original.

    Attributes:
        teacher: the original model.
        checkpoint: the truncated model.
        names: name of a tensor in the model → name on disk.
        layers: block → its sublayers to correct, see :func:`corrected_layers`.
    """

    teacher: Source
    checkpoint: Checkpoint
    names: Mapping[str, str]
    layers: Mapping[int, Sequence[str]]

    def block(self, layer: int, step: Step | None, gradients: Gradients) -> dict[str, Tensor]:
        """Return the corrected weights of a block's sublayers by name on disk.

        Factors are multiplied and corrected in float32, and converted once to the original dtype.

        Raises:
            NumericalError: a corrected weight is not finite.
        """
        found = {}
        for sublayer in self.layers[layer]:
            leaves = FACTORS[self.checkpoint.storage]
            read = self.checkpoint.weights.read
            weight = dense_product({leaf: read(f"{sublayer}.{leaf}") for leaf in leaves})
            stored = self.names[f"{sublayer}.weight"]
            teacher = self.teacher.weights.read(stored)
            if step is not None:
                weight = weight + step(teacher.to(weight.dtype) - weight, gradients(sublayer))
            found[stored] = weight.to(teacher.dtype)
            if not bool(found[stored].isfinite().all()):
                raise NumericalError(
                    f"The corrected weight of {sublayer} is not finite.",
                    "Use another `compress.correction`, or a smaller `compress.correction_step`.",
                )
        return found


Gradients = Callable[[str], Sequence[Tensor]]
"""Sublayer → the gradient of each batch."""


def _none(_sublayer: str) -> Sequence[Tensor]:
    return ()


def corrected_layers(plan: Plan) -> dict[int, list[str]]:
    """Return block → its low-rank sublayers but stacks, for blocks that have any. Stacks of experts
    are truncated without correction."""
    layers: dict[int, list[str]] = {}
    for s in plan.sublayers:
        if not s.dense and not is_stack(s.shape):
            layers.setdefault(s.layer, []).append(s.name)
    return layers


def write_weights(
    truncated: Truncated, folder: Path, step: Step | None, reporter: Reporter
) -> None:
    """Write the weights of a truncated model, corrected by ``step`` without gradients, if given.

    An interrupted run resumes after the last completed block.

    Raises:
        NumericalError: a corrected weight is not finite.
        OutputError: a file cannot be written.
    """
    with building_together(folder, _KEY) as home:
        layers = list(truncated.layers) if world().first else []
        with reporter.stage(
            "Correcting blocks" if step else "Multiplying out", len(layers)
        ) as advance:
            for layer in layers:
                if not intact(home / block_file(layer)):
                    tensors = truncated.block(layer, step, _none)
                    write_tensors(home / block_file(layer), tensors, {})
                advance()


@dataclass(frozen=True)
class Running:
    """How to compute gradients.

    Attributes:
        tokens: the text ``[S, L]``.
        batches: number of batches, each with a separate gradient.
        device: device of the blocks.
        dtype: dtype of the blocks; float32 is used for float16, because gradients exceed its range.
        batch: sequences per forward pass.
        place: location of hidden states.
    """

    tokens: Tensor
    batches: int
    device: torch.device
    dtype: torch.dtype
    batch: int
    place: Place


def write_by_gradients(
    truncated: Truncated,
    folder: Path,
    step: Step,
    running: Running,
    reporter: Reporter,
    state_seconds: float = STATE_SECONDS,
) -> None:
    """Write the weights of a truncated model, corrected by ``step`` with gradients.

    All gradients are at the truncated model, whose weights must be in the folder with the suffix
    ``.truncated``. An interrupted run resumes after the last completed block.

    Raises:
        SourceError: a file is missing or damaged.
        NumericalError: a gradient or a corrected weight is not finite.
        OutputError: a file cannot be written.
    """
    source = corrected(truncated.teacher, truncated_folder(folder))
    precise = torch.float32 if running.dtype == torch.float16 else running.dtype
    samples, seqlen = running.tokens.shape
    with building_together(folder, _KEY) as home:
        states = StatesHome(running.device, running.place, home)
        walk = BlockWalk(source, running.device, precise, running.batch, states)
        inputs = BlockInputs(home / INPUTS)
        reverse = ReverseWalk(walk, running.tokens, inputs, home, reporter, state_seconds)

        def is_done(layer: int) -> bool:
            return layer not in truncated.layers or intact(home / block_file(layer))

        def watch(layer: int, linears: Mapping[str, nn.Linear]) -> BatchGradients:
            low_rank = set(truncated.layers.get(layer, ()))
            return BatchGradients(
                {name: linear for name, linear in linears.items() if name in low_rank},
                running.device,
                samples=samples,
                seqlen=seqlen,
                batches=running.batches,
            )

        def write(layer: int, collected: BatchGradients) -> None:
            tensors = truncated.block(layer, step, partial(_finite, collected))
            write_tensors(home / block_file(layer), tensors, {})

        reverse.run(is_done, watch, write)
        if world().first:
            reverse.state.remove()
            inputs.remove()


def _finite(collected: BatchGradients, sublayer: str) -> Sequence[Tensor]:
    """Return the gradients of a sublayer. Raises NumericalError if they are not finite."""
    means = collected.means(sublayer)
    if not all(bool(mean.isfinite().all()) for mean in means):
        raise NumericalError(
            f"The gradient of {sublayer} is NaN or infinite.",
            "Use `model.dtype` float32, or other text.",
        )
    return means


def truncated_folder(folder: Path) -> Path:
    """Return the folder of the weights before correction."""
    return folder.with_name(f"{folder.name}.truncated")
