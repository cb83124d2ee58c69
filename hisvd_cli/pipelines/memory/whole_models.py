"""Checks whether work with a whole model in memory fits into the memory limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hisvd_cli.calibration.workload import Peak, parameters
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint
from hisvd_cli.modeling.sources.model_config import experts_per_token
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import memory_bounds
from hisvd_cli.pipelines.memory.placement import excess
from hisvd_cli.pipelines.memory.whole_model_peaks import (
    Training,
    WholeModel,
    evaluation_peak,
    learning_peak,
    probing_peak,
    streaming_peak,
    training_peak,
    writing_peak,
)
from hisvd_cli.pipelines.samples import request_calibration, stored_dtype, window_length
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.errors import MemoryLimitError, UnsupportedModelError

_STATES_BYTES = 1 << 30  # of hidden states per pass through the blocks, without a limit


def whole_model(resolved: Resolved, source: Source, dtype: torch.dtype | None = None) -> WholeModel:
    """Return the sizes of a dense or compressed model, without loading it.

    Args:
        resolved: the settings.
        source: the model.
        dtype: dtype of its weights in memory; by default that of the settings.
    """
    device = pick_device(resolved.settings.model.device)
    dtype = dtype or pick_dtype(resolved.settings.model.dtype, stored_dtype(source), device)
    config = source.config.get_text_config()
    return WholeModel(
        sublayers=_sublayers(source, config.hidden_size),
        parameters=sum(torch.Size(i.shape).numel() for i in source.weights.infos.values()),
        stored_bytes=source.weights.total_bytes,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        dtype=dtype,
        device=device,
        experts_per_token=experts_per_token(config),
    )


def _sublayers(source: Source, width: int) -> list[Sublayer]:
    try:
        model = build_meta_model(source, compressed=is_checkpoint(source.folder))
        prefix, layers = decoder_blocks(model)
        return find_sublayers(prefix, list(layers))
    except UnsupportedModelError:  # such models can still be evaluated
        return [Sublayer("", 0, "", (4 * width, width))]


def check_fits(resolved: Resolved, peak: Peak, reason: str, instead: str = "") -> None:
    """Check that work fits into the memory limit.

    Args:
        resolved: the settings.
        peak: its peak memory.
        reason: the setting that causes it, or what the work is.
        instead: what to do other than raising the limit; by default, to leave out ``reason``.

    Raises:
        UsageError: a limit for a device that is not used.
        MemoryLimitError: it does not fit.
    """
    bounds = memory_bounds(resolved)
    if bounds is None:
        return
    if found := excess(peak, bounds, pick_device(resolved.settings.model.device).type):
        raise MemoryLimitError(
            f"{reason} loads the whole model and takes {found}.",
            f"Raise `model.max_memory`, or {instead or f'leave out {reason}'}.",
        )


def check_measuring(resolved: Resolved, source: Source, allocator: str) -> None:
    """Check that an allocator that runs the model fits into the memory limit. Raises as
    :func:`check_fits`."""
    if memory_bounds(resolved) is None:
        return
    request, model = request_calibration(resolved, source), whole_model(resolved, source)
    samples = min(resolved.settings.plan.probe_samples, request.samples)
    taken = learning_peak if allocator == "learned" else probing_peak
    peak = taken(model, samples, request.seqlen, exact_device(model.device))
    check_fits(resolved, peak, f"`plan.allocator` {allocator}")


def check_writing(resolved: Resolved, source: Source, seqlen: int, reason: str) -> None:
    """Check that generating text with the model fits into the memory limit. Raises as
    :func:`check_fits`."""
    if memory_bounds(resolved) is not None:
        check_fits(resolved, writing_peak(whole_model(resolved, source), seqlen), reason)


def check_training(
    resolved: Resolved,
    models: tuple[Source, Source | None],
    dtype: torch.dtype,
    shape: tuple[int, int],
    factors: int | None = None,
) -> None:
    """Check that a recovery fits into the memory limit.

    Args:
        resolved: the settings.
        models: the checkpoint, or the dense model before compression; and the teacher.
        dtype: dtype of the models.
        shape: windows per pass, and tokens in each.
        factors: parameters of the low-rank factors; by default those of the ratio.

    Raises:
        UsageError, MemoryLimitError: see :func:`check_fits`.
    """
    if memory_bounds(resolved) is None:
        return
    knobs, student = resolved.settings.recover, whole_model(resolved, models[0], dtype)
    inside = parameters(student.sublayers)
    if factors is None:
        factors = int(inside * resolved.settings.plan.ratio[0])
        student = replace(student, parameters=student.parameters - inside + factors)
    adapters = 0
    if knobs.method == "lora":
        adapters = knobs.lora_rank * student.sides
    work = Training(factors, adapters, shape[0] * shape[1], shape[1], knobs.checkpointing)
    teacher = whole_model(resolved, models[1], dtype) if models[1] else None
    check_fits(resolved, training_peak(student, teacher, work), f"`recover.method` {knobs.method}")


def streamed_states(
    resolved: Resolved, source: Source, seqlen: int, baseline: Source | None = None
) -> int | None:
    """Return the bytes of hidden states per pass if the memory limit requires evaluation one block
    at a time; None if the whole model fits.

    Args:
        resolved: the settings.
        source: the model.
        seqlen: tokens per window.
        baseline: the model to compare with, if any.

    Raises:
        UsageError, MemoryLimitError: see :func:`check_fits`.
    """
    bounds = memory_bounds(resolved)
    if bounds is None:
        return None
    knobs, model = resolved.settings.eval, whole_model(resolved, source)
    head = whole_model(resolved, baseline).head if baseline else 0
    whole = evaluation_peak(model, knobs.batch, seqlen, head)
    device = model.device.type
    if knobs.stream == "off" or (knobs.stream == "auto" and not excess(whole, bounds, device)):
        check_fits(
            resolved, whole, f"Evaluating {Path(source.name).name}", "give `eval.stream` auto"
        )
        return None
    least = streaming_peak(model, knobs.batch, seqlen, head)
    if found := excess(least, bounds, device):
        raise MemoryLimitError(
            f"Evaluating {Path(source.name).name} one block at a time takes {found}.",
            "Raise `model.max_memory`, or lower `eval.batch` or `eval.seqlen`.",
        )
    free = _STATES_BYTES if bounds.host is None else bounds.host - least.host
    return min(_STATES_BYTES, free)


def check_evaluation(resolved: Resolved, source: Source) -> None:
    """Check that evaluation fits into the memory limit. Raises as :func:`check_fits`."""
    if memory_bounds(resolved) is not None:
        seqlen = window_length(resolved.settings.eval.seqlen, source, "eval.seqlen")
        streamed_states(resolved, source, seqlen)
