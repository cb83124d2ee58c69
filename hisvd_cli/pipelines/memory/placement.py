"""A bound on memory ─► where hidden states live, and how many sequences pass a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hisvd_cli.calibration.workload import Peak, Workload
from hisvd_cli.modeling.hidden_states import Place
from hisvd_cli.utils.errors import MemoryLimitError
from hisvd_cli.utils.memory_bounds import HOST, MemoryBounds


def fit(
    work: Workload,
    bounds: MemoryBounds,
    peak: Callable[[Workload], Peak],
    what: str = "A calibration",
) -> Workload:
    """Return the workload as it fits: states as near to the blocks as they may be, and batches
    halved only where no place for the states is far enough.

    Args:
        work: with the largest batch.
        bounds: what may be taken.
        peak: estimates what a workload takes.
        what: what an error calls the work.

    Raises:
        MemoryLimitError: even the least does not fit; names what would.
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
    """Say by what a peak exceeds a bound; nothing where it does not.

    Args:
        peak: bytes.
        bounds: what may be taken.
        device: type of the device whose own memory is counted.
    """
    for name, taken, bound in (
        (HOST, peak.host, bounds.host),
        (device, peak.device, bounds.devices.get(device)),
    ):
        if bound is not None and taken > bound:
            return (
                f"{_size(taken)} of {name} memory, above `model.max_memory` {name}={_size(bound)}"
            )
    return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f}GB" if count >= 1e9 else f"{count / 1e6:.0f}MB"
