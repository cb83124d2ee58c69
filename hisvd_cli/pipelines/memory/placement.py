"""Chooses place of the hidden states and batch size by a memory limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hisvd_cli.calibration.workload import Peak, Workload
from hisvd_cli.modeling.hidden_states import Place
from hisvd_cli.utils.errors import MemoryLimitError
from hisvd_cli.utils.quantities import HOST, MemoryBounds


def fit(
    work: Workload,
    bounds: MemoryBounds,
    peak: Callable[[Workload], Peak],
    what: str = "A calibration",
) -> Workload:
    """Return the first workload that fits: hidden states on the device, in host memory, or in a
    file, in this order, and then with halved batches.

    Args:
        work: the workload with the largest batch.
        bounds: the memory limits.
        peak: estimates the peak memory of a workload.
        what: name of the work, for errors.

    Raises:
        MemoryLimitError: even the smallest workload does not fit.
    """
    least = work
    for least in _candidates(work):
        if not excess(peak(least), bounds, least.device.type):
            return least
    found = excess(peak(least), bounds, least.device.type)
    raise MemoryLimitError(
        f"{what} with windows of {work.seqlen} tokens takes {found}.",
        "Raise `model.max_memory`, or lower `calibration.seqlen`. `calibration.batch` and "
        "`calibration.samples` make no difference: this is for one window at a time, with hidden "
        "states in a file.",
    )


def _candidates(work: Workload) -> Iterator[Workload]:
    places: tuple[Place, ...] = ("device", "host", "file")
    if work.device.type == HOST:
        places = ("host", "file")
    batch = min(work.batch, work.samples)
    while True:
        for place in places:
            yield replace(work, batch=batch, place=place)
        if batch == 1:
            return
        batch //= 2


def excess(peak: Peak, bounds: MemoryBounds, device: str) -> str:
    """Return how a peak exceeds a limit, as text; empty if it does not.

    Args:
        peak: the peak memory.
        bounds: the memory limits.
        device: type of the device that ``peak.device`` counts.
    """
    for name, taken, bound in (
        (HOST, peak.host, bounds.host),
        (device, peak.device, bounds.devices.get(device)),
    ):
        if bound is not None and taken > bound:
            return (
                f"{_size(taken)} of {name} memory, above `model.max_memory={name}={_size(bound)}`"
            )
    return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f}GB" if count >= 1e9 else f"{count / 1e6:.0f}MB"
