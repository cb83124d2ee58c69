"""Fits work on single blocks into the memory limit of the settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.calibration.workload import (
    Peak,
    Workload,
    calibration_peak,
    factoring_peak,
    gradients_peak,
    quantization_peak,
    update_peak,
)
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.placement import excess, fit
from hisvd_cli.pipelines.samples import request_calibration, stored_dtype
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import MemoryLimitError, UsageError
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.quantities import HOST, MemoryBounds, counted, parse_bounds


def memory_bounds(resolved: Resolved) -> MemoryBounds | None:
    """Return the memory limits of the settings, None if there are none.

    Raises:
        UsageError: a limit for a device that is not used.
    """
    model = resolved.settings.model
    if model.max_memory is None:
        return None
    bounds = parse_bounds(model.max_memory)
    device = pick_device(model.device).type
    for name in bounds.devices:
        if name != device:
            raise UsageError(
                f"`model.max_memory={model.max_memory}` limits {name}, but blocks run on {device}.",
                f"Leave out {name}=, or use `model.device={name}`.",
            )
    return bounds


def workload(resolved: Resolved, source: Source, anatomy: Anatomy) -> Workload:
    """Return the workload of a calibration by the settings, without a memory limit."""
    request = request_calibration(resolved, source)
    device = torch.device(request.device)
    return Workload(
        sublayers=anatomy.sublayers,
        outside_parameters=anatomy.total_parameters - anatomy.inside,
        width=source.config.get_text_config().hidden_size,
        samples=request.samples,
        seqlen=request.seqlen,
        batch=resolved.settings.calibration.batch,
        dtype=getattr(torch, request.dtype),
        device=device,
        place="host" if device.type == HOST else "device",
        experts_per_token=anatomy.experts_per_token,
    )


def fitted(resolved: Resolved, work: Workload, needs: Collection[Need]) -> Workload:
    """Return a workload changed to fit into the memory limits of the settings.

    Raises:
        UsageError: a limit for a device that is not used.
        MemoryLimitError: it cannot fit.
    """
    bounds = memory_bounds(resolved)
    return work if bounds is None else fit(work, bounds, partial(_peak, needs=needs))


def _peak(work: Workload, needs: Collection[Need]) -> Peak:
    peak = calibration_peak(work)
    if set(needs) - {"moments"}:
        return peak.joined(gradients_peak(work, "weight-gradients" in needs))
    return peak


def place_states(
    resolved: Resolved,
    source: Source,
    needs: Collection[Need],
    reporter: Reporter,
    shape: tuple[int, int] | None = None,
) -> Workload:
    """Return the workload of a calibration that fits, and report what the limit changes.

    Args:
        resolved: the settings.
        source: the model.
        needs: the statistics to collect.
        reporter: receives what the limit changes.
        shape: windows and tokens in each; by default those of the settings.

    Raises:
        UsageError, MemoryLimitError: see :func:`fitted`.
    """
    work = workload(resolved, source, dissect(source))
    if shape is not None:
        work = replace(work, samples=shape[0], seqlen=shape[1])
    found = fitted(resolved, work, needs)
    _report(work, found, found.states_bytes, reporter)
    return found


def place_update(
    resolved: Resolved, source: Source, reporter: Reporter, shape: tuple[int, int]
) -> Workload:
    """Return the workload of an update that fits, and report what the limit changes.

    Args:
        resolved: the settings.
        source: the model.
        reporter: receives what the limit changes.
        shape: windows and tokens in each.

    Raises:
        UsageError, MemoryLimitError: see :func:`fitted_update`.
    """
    work = replace(workload(resolved, source, dissect(source)), samples=shape[0], seqlen=shape[1])
    found = fitted_update(resolved, work)
    _report(work, found, 2 * found.states_bytes, reporter)
    return found


def fitted_update(resolved: Resolved, work: Workload) -> Workload:
    """Return the workload of an update changed to fit into the memory limits of the settings.

    Raises:
        UsageError: a limit for a device that is not used.
        MemoryLimitError: it cannot fit.
    """
    bounds = memory_bounds(resolved)
    return work if bounds is None else fit(work, bounds, update_peak, "An update")


def check_update(resolved: Resolved, source: Source) -> None:
    """Check that the update of the settings, if any, is possible and fits into the memory limit.

    Raises:
        UsageError: there are several processes, or see :func:`fitted_update`.
        MemoryLimitError: see :func:`fitted_update`.
    """
    if resolved.settings.compress.update != "none":
        if world().size > 1:
            raise UsageError(
                "`compress.update` runs in one process, but torchrun started several.",
                "Run hisvd without torchrun, or leave out `compress.update`.",
            )
        fitted_update(resolved, workload(resolved, source, dissect(source)))


def _report(work: Workload, found: Workload, states: int, reporter: Reporter) -> None:
    """Report what the memory limit changed."""
    if found.place != work.place:
        where = "in a file" if found.place == "file" else "in host memory"
        size = f"{states / 1e6:,.0f} MB"
        reporter.note(f"`model.max_memory`: hidden states ({size}) are kept {where}.")
    if found.batch < min(work.batch, work.samples):
        reporter.warn(
            f"`model.max_memory`: {counted(found.batch, 'window')} per forward pass instead of "
            f"{work.batch}; results may differ in their last digits."
        )


def check_factoring(resolved: Resolved, source: Source) -> None:
    """Check that spectra and factors of the largest sublayer fit into the memory limit.

    Raises:
        UsageError: a limit for a device that is not used.
        MemoryLimitError: they do not fit.
    """
    bounds = memory_bounds(resolved)
    if bounds is None:
        return
    peak = factoring_of(resolved, source, dissect(source))
    if found := excess(peak, bounds, pick_device(resolved.settings.model.device).type):
        raise MemoryLimitError(
            f"Factoring the largest layer takes {found}.",
            "Raise `model.max_memory`; `calibration.samples`, `calibration.seqlen` and "
            "`calibration.batch` make no difference.",
        )


def factoring_of(resolved: Resolved, source: Source, anatomy: Anatomy) -> Peak:
    """Return the peak of computing spectra and factors of all sublayers."""
    device = exact_device(pick_device(resolved.settings.model.device))
    itemsize = getattr(torch, stored_dtype(source)).itemsize
    return factoring_peak(anatomy.sublayers, itemsize, device)


def check_rounding(resolved: Resolved, source: Source) -> None:
    """Check that gptq, one block at a time, fits into the memory limit.

    Raises:
        UsageError: a limit for a device that is not used.
        MemoryLimitError: it does not fit.
    """
    bounds = memory_bounds(resolved)
    if bounds is None:
        return
    work = workload(resolved, source, dissect(source))
    if found := excess(quantization_peak(work), bounds, work.device.type):
        raise MemoryLimitError(
            f"`quantize.method` gptq takes {found}.",
            "Raise `model.max_memory`, lower `calibration.samples`, `calibration.seqlen` or "
            "`calibration.batch`, or use `quantize.method` nearest.",
        )
