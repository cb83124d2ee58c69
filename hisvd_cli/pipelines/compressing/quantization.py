"""Quantizes checkpoints by the settings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from hisvd_cli.calibration.store import Calibration, Sample, recorded_calibration
from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.compression.quantization import quantize, sublayers_of
from hisvd_cli.compression.quantized_parts import Recipe, Text, factored_stacks
from hisvd_cli.export.model_card import rewrite_card
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.modeling.layers.quantized import dequantize
from hisvd_cli.modeling.layers.shapes import is_stack
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.samples import (
    calibration_sample,
    draw_sample,
    other_sample,
    request_calibration,
)
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.progress import Reporter

_BITS = {"none": 16, "int8": 8, "int4": 4}


def quantizes(resolved: Resolved) -> bool:
    """Return whether the settings request quantization."""
    return resolved.settings.quantize.bits != "none"


def bytes_saved(resolved: Resolved, numbers: int, itemsize: float) -> int:
    """Estimate the bytes that quantization saves. It neglects the scales of int8 and short groups,
    and assumes that every sublayer is low-rank.

    Args:
        resolved: the settings.
        numbers: number of weights in sublayers.
        itemsize: bytes of each before quantization.
    """
    knobs = resolved.settings.quantize
    width = {"none": itemsize, "int8": 1, "int4": 0.5 + 2 / knobs.group_size}[knobs.bits]
    return int(numbers * (itemsize - width))


def check_quantization(resolved: Resolved, planned: bool = False) -> None:
    """Check before any work that the requested quantization is possible.

    Args:
        resolved: the settings.
        planned: whether a plan chooses the bits of every sublayer.

    Raises:
        UsageError: bits although a plan chooses them, or a device that cannot run the result.
    """
    knobs = resolved.settings.quantize
    if planned:
        if quantizes(resolved):
            raise UsageError(
                f"`quantize.bits` {knobs.bits} conflicts with a plan by bytes, which chooses the "
                "bits of every layer.",
                "Leave out `quantize.bits`, or `plan.bytes_ratio`.",
            )
        _check_device(resolved, "int4")
        return
    if quantizes(resolved):
        _check_device(resolved, knobs.bits)


def _check_device(resolved: Resolved, bits: str) -> None:
    device = pick_device(resolved.settings.model.device)
    dtype = torch.uint8 if bits == "int4" else torch.int8
    try:
        codes = torch.zeros(2, 2, dtype=dtype, device=device)
        scales = torch.zeros(2, 1, dtype=torch.int16, device=device)
        dequantize(codes, scales, 2, 2, torch.float32)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UsageError(
            f"The device {device} cannot run {bits}.", "Use another `model.device`, or int8."
        ) from error


def quantize_checkpoint(
    resolved: Resolved,
    checkpoint: Checkpoint,
    output: Path,
    sample: Sample | None,
    reporter: Reporter,
    bits: Mapping[str, int] | None = None,
) -> int:
    """Quantize a checkpoint by the settings; return the bytes of the weights.

    Args:
        resolved: the settings.
        checkpoint: the checkpoint in full precision.
        output: the folder to write.
        sample: tokens for gptq; by default from the text of the settings, or else from the text
            that the checkpoint was calibrated on.
        reporter: receives progress.
        bits: sublayer → 16, 8 or 4; by default the bits of the settings for all.

    Raises:
        UsageError, SourceError, NumericalError, OutputError: see :func:`check_quantization` and
            :func:`hisvd_cli.compression.quantization.quantize`.
        DataError, StaleArtifactError: the text for gptq cannot be read, or has changed.
    """
    if bits is None:
        check_quantization(resolved)
    settings = resolved.settings
    knobs = settings.quantize
    source = Source(str(checkpoint.folder), checkpoint.folder)
    text = None
    if knobs.method == "gptq":
        checkpoint.refuse_quantized()
        device = pick_device(settings.model.device)
        dtype = pick_dtype(settings.model.dtype, checkpoint.weights.dtype, device)
        sample = sample or _sample(resolved, source, checkpoint, reporter)
        text = Text(sample, device, dtype, settings.calibration.batch)
    elif knobs.bits == "int4" or checkpoint.storage == "pivoted":
        reporter.suggest(
            "Rounding to nearest loses much accuracy with int4 and with pivoted pairs; "
            "`quantize.method` gptq loses several times less."
        )
    if stacks := len(factored_stacks(checkpoint)):
        kept = checkpoint.weights.dtype
        reporter.note(f"Experts are not quantized: the factors of {stacks} stacks stay in {kept}.")
    bits = bits or _bits(resolved, checkpoint)
    recipe = Recipe(bits, knobs.group_size, knobs.method, knobs.damping)
    return quantize(
        checkpoint,
        output,
        recipe,
        text,
        shard_bytes=int(settings.compress.max_shard_size * 1e9),
        settings=resolved.recorded("quantize"),
        describe=partial(rewrite_card, checkpoint.folder),
        reporter=reporter,
    )


def _bits(resolved: Resolved, checkpoint: Checkpoint) -> dict[str, int]:
    """Return sublayer → bits, by the settings; stacks of experts are not quantized."""
    knobs = resolved.settings.quantize
    single = [s.name for s in sublayers_of(checkpoint) if not is_stack(s.shape)]
    bits = dict.fromkeys(single, _BITS[knobs.bits])
    if knobs.dense == "int8":
        bits |= dict.fromkeys(bits.keys() - checkpoint.ranks.keys(), 8)
    return bits


def _sample(
    resolved: Resolved, source: Source, checkpoint: Checkpoint, reporter: Reporter
) -> Sample:
    """Return tokens of the text of the settings, or else of the checkpoint's calibration."""
    manifest = checkpoint.provenance.get("calibration")
    if not manifest:
        return draw_sample(request_calibration(resolved, source), source, reporter)
    made_from = recorded_calibration(checkpoint.folder, manifest)
    if resolved.asked("calibration"):
        return other_sample(resolved, source, made_from, reporter)
    return calibration_sample(resolved, source, made_from, reporter)


def quantize_compressed(
    resolved: Resolved,
    source: Source,
    calibration: Calibration,
    made: Compressed,
    output: Path,
    reporter: Reporter,
    bits: Mapping[str, int] | None = None,
) -> Compressed:
    """Quantize a checkpoint that was just compressed.

    Args:
        resolved: the settings.
        source: the model before compression.
        calibration: the calibration used for compression; gptq uses the same text.
        made: the checkpoint in full precision.
        output: the folder to write.
        reporter: receives progress.
        bits: see :func:`quantize_checkpoint`.

    Raises:
        HisvdError: see :func:`quantize_checkpoint`.
    """
    started = time.monotonic()
    sample = None
    if resolved.settings.quantize.method == "gptq":
        sample = calibration_sample(resolved, source, calibration, reporter)
    checkpoint = open_checkpoint(made.output)
    size = quantize_checkpoint(resolved, checkpoint, output, sample, reporter, bits)
    seconds = made.write_seconds + time.monotonic() - started
    record = open_checkpoint(output).provenance
    return Compressed(output, size, made.decompose_seconds, seconds, record)
