"""Distributed runs: started by ``torchrun``, connected through ``torch.distributed``.

Every process runs the same command. Process 0 decides, samples, writes and prints; each process
handles its share of the calibration sequences and of the sublayers. Without ``torchrun`` there is
one process, and the functions below do nothing.
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
"""How long processes wait for work that one does alone, such as an evaluation. Dead processes are
detected by closed connections, not by this timeout."""


@dataclass(frozen=True)
class World:
    """The processes of a run: this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process decides, writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the contiguous share of ``count`` items that belongs to this process; empty if
        there are more processes than items and this is one of the last."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def wait(self) -> None:
        """Wait until all processes reach this point. Raises LostProcessError."""
        if self.size > 1:
            import torch
            from torch.distributed import all_reduce

            with _detecting_loss():  # a CPU tensor uses gloo, which detects dead processes
                all_reduce(torch.zeros(1))

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on the first process only, and return its result on all.

        Raises:
            LostProcessError: a process died; on the first process, whatever ``work`` raises.
        """
        if self.size == 1:
            return work()
        from torch.distributed import broadcast_object_list

        box = [work()] if self.first else [None]
        with _detecting_loss():
            broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]  # filled by the broadcast

    def after_first(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on the first process, then on the others, which find what it downloaded or
        cached. Raises LostProcessError."""
        if self.first:
            result = work()
            self.wait()
            return result
        self.wait()
        return work()

    def gathered(self, value: Result) -> list[Result]:
        """Return the values of all processes, on all processes. Raises LostProcessError."""
        if self.size == 1:
            return [value]
        from torch.distributed import all_gather_object

        box: list[Result] = [value] * self.size
        with _detecting_loss():
            all_gather_object(box, value)
        return box

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place on the first; its content is undefined on the
        others. Raises LostProcessError."""
        if self.size == 1:
            return
        from torch.distributed import reduce

        if tensor.is_cuda:
            self.wait()  # gloo detects a dead process, nccl would wait for it
        with _detecting_loss():
            reduce(tensor, dst=0)


def world() -> World:
    """Return the processes of this run."""
    if not launched():
        return World()
    from torch.distributed import get_rank, get_world_size, is_initialized

    return World(get_rank(), get_world_size()) if is_initialized() else World()


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """Return the rank of this process, also before it has joined the process group."""
    return int(os.environ["RANK"]) if launched() else 0


def own_gpu(device: str) -> str:
    """Return the device of this process for the setting ``device``.

    Raises:
        UsageError: one GPU is named for several processes, or there are fewer GPUs than processes.
    """
    if not launched() or device == "cpu":
        return device
    import torch

    if device.startswith("cuda:"):
        raise UsageError(
            f"`model.device={device}` names one GPU for several processes.",
            "Omit `model.device`: each process uses its own GPU.",
        )
    if not torch.cuda.is_available() or device not in ("auto", "cuda"):
        return "cpu" if device == "auto" else device
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"There are more processes than GPUs ({count}) on this machine.",
            f"Start torchrun with --nproc-per-node {count}.",
        )
    return f"cuda:{local}"


@contextmanager
def joining(device: str, show: Callable[[HisvdError], None]) -> Iterator[None]:
    """Join the process group that torchrun started while the body runs.

    Args:
        device: the device setting; with a GPU, nccl is used in addition to gloo.
        show: prints the error that ends the run.

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
    with guarding(show):
        with _detecting_loss():
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
    """Exit immediately if torchrun started this process. To be called after all work is done.

    A regular interpreter exit tears down connection threads, which occasionally aborts (SIGABRT);
    torchrun then reports a failed run.
    """
    if launched():
        os._exit(0)


@contextmanager
def _detecting_loss() -> Iterator[None]:
    """Convert communication failures of the body to LostProcessError."""
    from torch import OutOfMemoryError

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OutOfMemoryError):
            raise
        raise LostProcessError from error


@contextmanager
def building_together(folder: Path, key: str) -> Iterator[Path]:
    """Build a folder with all processes; the first one handles it as :func:`building` does.

    Raises:
        OutputError: see :func:`building`.
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
    """Return name → process, with the cost balanced over processes.

    Items are assigned group by group, the most costly first, to the process with the least load
    (longest processing time first, Graham 1969).

    Args:
        groups: (name, cost) pairs per group; processes work through the groups in order.
        size: number of processes.
    """
    load = [0] * size
    owner: dict[str, int] = {}
    for group in groups:
        for name, cost in sorted(group, key=lambda item: -item[1]):
            owner[name] = load.index(min(load))
            load[owner[name]] += cost
    return owner
