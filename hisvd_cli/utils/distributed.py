"""Several processes on one model: started by ``torchrun``, joined through ``torch.distributed``.

Every process runs the same command. Process 0 decides, draws, writes and prints; the others hold
their share of the calibration sequences and of the sublayers. Without ``torchrun`` there is one
process, and all below does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hisvd_cli.utils.errors import HisvdError, LostProcessError, UsageError
from hisvd_cli.utils.files.artifact import building, partial_path
from hisvd_cli.utils.watchdog import connect, guarding

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

TIMEOUT = timedelta(days=7)
"""For how long processes wait for what one does alone, such as measuring a model. Those that die
are noticed by their closed connections, and not by time."""


@dataclass(frozen=True)
class World:
    """The processes of a run, of which this is number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of ``count`` things in a row are this process's; none where there are fewer
        than processes and it is one of the last."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def wait(self) -> None:
        """Wait until all processes are here. Raises LostProcessError."""
        if self.size > 1:
            import torch
            from torch.distributed import all_reduce

            with _noticing():  # numbers on the CPU: gloo, which notices a dead process
                all_reduce(torch.zeros(1))

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Return on all processes what ``work`` returns on the first, which alone runs it.

        Raises:
            LostProcessError: a process died; on the first, whatever ``work`` raises.
        """
        if self.size == 1:
            return work()
        from torch.distributed import broadcast_object_list

        box = [work()] if self.first else [None]
        with _noticing():
            broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]  # it holds the first's result now

    def after_first(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on all processes, on the first before the others, which then find what it
        downloaded or cached. Raises LostProcessError."""
        if self.first:
            result = work()
            self.wait()
            return result
        self.wait()
        return work()

    def gathered(self, value: Result) -> list[Result]:
        """Return on all processes the values of all. Raises LostProcessError."""
        if self.size == 1:
            return [value]
        from torch.distributed import all_gather_object

        box: list[Result] = [value] * self.size
        with _noticing():
            all_gather_object(box, value)
        return box

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor of all processes into that of the first, in place; on the others it holds
        anything afterwards. Raises LostProcessError."""
        if self.size == 1:
            return
        from torch.distributed import reduce

        if tensor.is_cuda:
            self.wait()  # nccl would wait for a dead process, gloo does not
        with _noticing():
            reduce(tensor, dst=0)


def world() -> World:
    """Return the processes that this one belongs to."""
    if not launched():
        return World()
    from torch.distributed import get_rank, get_world_size, is_initialized

    return World(get_rank(), get_world_size()) if is_initialized() else World()


def launched() -> bool:
    """Tell whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """Return the number of this process, before it has joined the others too."""
    return int(os.environ["RANK"]) if launched() else 0


def own_gpu(device: str) -> str:
    """Return the name of the device that a process takes where the settings say ``device``.

    Raises:
        UsageError: one GPU is named for several processes, or there are fewer than those.
    """
    if not launched() or device == "cpu":
        return device
    import torch

    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} is one GPU for several processes.",
            "Leave it out: each process takes a GPU of its own.",
        )
    if not torch.cuda.is_available() or device not in ("auto", "cuda"):
        return "cpu" if device == "auto" else device
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"There are more processes than the {count} GPUs of this machine.",
            f"Start torchrun with --nproc-per-node {count}.",
        )
    return f"cuda:{local}"


@contextmanager
def joining(device: str, tell: Callable[[HisvdError], None]) -> Iterator[None]:
    """Join the processes that torchrun started while the body runs, and end with them.

    Args:
        device: that of the settings; the processes join through nccl too where it is a GPU.
        tell: prints the error that ends the run.

    Raises:
        UsageError: see :func:`own_gpu`.
        LostProcessError: a process does not join.
    """
    if not launched():
        yield
        return
    import torch
    from torch import distributed

    name = own_gpu(device)
    on_gpu = name.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(name)
    with guarding(tell):
        with _noticing():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=connect(),
                rank=launched_rank(),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=TIMEOUT,
            )
        yield
        world().wait()


def leave() -> None:
    """End this process at once if torchrun started it and it has done all its work.

    An interpreter that ends takes threads of the processes' connections apart, which aborted
    (SIGABRT) now and then when all was done: torchrun took the run for failed.
    """
    if launched():
        os._exit(0)


@contextmanager
def _noticing() -> Iterator[None]:
    """Have a failure of what the body does with the other processes say so."""
    from torch import OutOfMemoryError

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OutOfMemoryError):
            raise
        raise LostProcessError from error


@contextmanager
def building_together(folder: Path, key: str) -> Iterator[Path]:
    """Have all processes build a folder; the first one does with it what :func:`building` does.

    Raises:
        OutputError: see there.
        LostProcessError: a process died.
    """
    here = world()
    with ExitStack() as stack:
        if here.first:
            partial = stack.enter_context(building(folder, key))
        else:
            partial = partial_path(folder.resolve())
        here.wait()
        yield partial
        here.wait()
    here.wait()


def share_by_cost(groups: Sequence[Sequence[tuple[str, int]]], size: int) -> dict[str, int]:
    """Return name → process, so that all have about as much to do.

    Groups are dealt one after the other, of each the most costly first, to the process that has
    least so far (longest processing time first, Graham 1969).

    Args:
        groups: (name, cost) of what belongs together; processes work through groups in order.
        size: number of processes.
    """
    load = [0] * size
    owner: dict[str, int] = {}
    for group in groups:
        for name, cost in sorted(group, key=lambda item: -item[1]):
            owner[name] = load.index(min(load))
            load[owner[name]] += cost
    return owner
