"""Adds gradients of the loss at every linear layer to a calibration, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hisvd_cli.calibration.block_inputs import INPUTS, BlockInputs
from hisvd_cli.calibration.calibrate import STATE_SECONDS
from hisvd_cli.calibration.gradient_collector import GradientCollector
from hisvd_cli.calibration.reverse_walk import ReverseWalk
from hisvd_cli.calibration.routing import stacks_among
from hisvd_cli.calibration.statistics_files import block_file, weights_file
from hisvd_cli.calibration.store import (
    FORMAT_VERSION,
    GRADIENTS,
    GRADIENTS_MANIFEST,
    Calibration,
    Sample,
    open_calibration,
)
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.hidden_states import Place, StatesHome
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import find_sublayers
from hisvd_cli.utils.distributed import building_together, world
from hisvd_cli.utils.errors import NumericalError, UnsupportedModelError
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.files.tensorfile import write_tensors
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions


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
    """Add the gradients of the loss on the calibration tokens to a calibration.

    An interrupted run resumes after the last completed block.

    Args:
        source: the model.
        sample: the tokens of the calibration.
        calibration: the calibration; gradients are written to a subfolder of it.
        device: where blocks run.
        dtype: dtype of the passes; float16 is replaced by float32, since gradients underflow in it.
        batch: sequences per chunk.
        weights: also collect weight gradients per sequence.
        settings: the resolved settings, recorded unchanged.
        reporter: receives progress.
        state_seconds: interval between writes of the hidden states' gradient.
        place: where hidden states and their gradient are kept.

    Returns:
        The calibration with gradients.

    Raises:
        SourceError: weights or stored block inputs are missing or damaged.
        NumericalError: the loss or a gradient is not finite.
        OutputError: files cannot be written.
    """
    precise = torch.float32 if dtype == torch.float16 else dtype
    key = digest(str(FORMAT_VERSION), calibration.key, str(precise), str(weights))
    with building_together(calibration.folder / GRADIENTS, key) as partial:
        walk = BlockWalk(source, device, precise, batch, StatesHome(device, place, partial))
        if weights:
            _refuse_experts(walk)
        inputs = BlockInputs(calibration.folder / INPUTS)
        reverse = ReverseWalk(walk, sample.tokens, inputs, partial, reporter, state_seconds)
        blocks = _Blocks(walk, calibration, partial, sample.tokens.shape[1], weights, reporter)
        reverse.run(blocks.is_done, blocks.watch, blocks.write)
        manifest = {
            "kind": "gradients",
            "format_version": FORMAT_VERSION,
            "key": key,
            "calibration": calibration.key,
            "weights": weights,
            "dtype": dtype_name(precise),
            "settings": settings,
            "versions": versions(),
        }
        if world().first:
            reverse.state.remove()
            write_json(partial / GRADIENTS_MANIFEST, manifest)
    if world().first:
        inputs.remove()
    return open_calibration(calibration.folder)


def _refuse_experts(walk: BlockWalk) -> None:
    if stacks_among(find_sublayers(walk.prefix, list(walk.layers))):
        raise UnsupportedModelError(
            f"{type(walk.model).__name__} is a mixture of experts, for which weight gradients are "
            "not implemented.",
            "Choose a method that needs no weight gradients, such as the preset `best`.",
        )


@dataclass(frozen=True)
class _Blocks:
    """Collects and writes the gradients of blocks."""

    walk: BlockWalk
    calibration: Calibration
    partial: Path
    seqlen: int
    weights: bool
    reporter: Reporter

    def is_done(self, index: int) -> bool:
        """Return whether the gradients of a block are written."""
        files = [block_file(index), *([weights_file(index)] if self.weights else [])]
        return all(intact(self.partial / file) for file in files)

    def watch(self, index: int, linears: Mapping[str, nn.Linear]) -> GradientCollector:
        """Return the collector for a block."""
        return GradientCollector(
            linears,
            self.walk.device,
            keys=self.calibration.moment_keys(index),
            seqlen=self.seqlen,
            weights=self.weights,
            stacks=self.stacks(index),
        )

    def stacks(self, index: int) -> dict[str, list[str]]:
        """Return the stacks of experts of a block."""
        sublayers = find_sublayers(self.walk.prefix, list(self.walk.layers))
        return stacks_among([s for s in sublayers if s.layer == index])

    def write(self, index: int, collector: GradientCollector) -> None:
        """Write the gradients of a block. Raises NumericalError, OutputError."""
        means = collector.means()
        experts = {member for each in self.stacks(index).values() for member in each}
        for name in self.calibration.moment_keys(index):
            found = means[f"{name}.square"]
            if not bool(found.isfinite()):
                raise NumericalError(
                    f"The gradient at the output of {name} is NaN or infinite.",
                    "Set `model.dtype` to float32, or calibrate on another text.",
                )
            if not bool(found) and name not in experts:
                self.reporter.warn(
                    f"The gradient at the output of {name} is zero: the loss does not depend on it."
                )
        if self.weights:
            write_tensors(self.partial / weights_file(index), collector.weight_means(), {})
        write_tensors(self.partial / block_file(index), means, {})
