"""Selects torch devices and dtypes from their names, including ``auto``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hisvd_cli.utils.distributed import own_gpu
from hisvd_cli.utils.dtype_speed import as_fast_as_float32
from hisvd_cli.utils.errors import UsageError

_RUNNABLE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def pick_device(name: str) -> torch.device:
    """Return the device ``name``; ``auto`` selects a GPU if there is one. In a distributed run,
    each process gets its own GPU.

    Raises:
        UsageError: there is no such device, or fewer GPUs than processes.
    """
    name = own_gpu(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # rejects 'meta', which holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"Device '{name}' is not available.",
            "Set `model.device` to cpu, cuda, cuda:1, mps or auto.",
        ) from error
    return device


def pick_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """Return the dtype for forward passes.

    ``auto`` selects the dtype of the weights on disk if products in it are at least as fast as in
    float32 on this device, else float32. It also selects float32 for float16 on a CPU, which
    overflows on many models, and for dtypes that forward passes do not support.

    Args:
        name: ``auto`` or a dtype.
        stored: dtype of the weights on disk.
        device: where forward passes run.
    """
    dtype = _RUNNABLE.get(stored if name == "auto" else name, torch.float32)
    if name != "auto" or dtype.itemsize >= torch.float32.itemsize:
        return dtype
    overflows = dtype == torch.float16 and device.type == "cpu"
    slow = overflows or not as_fast_as_float32(dtype, device)
    return torch.float32 if slow else dtype


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if known.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", known.read_text())):
        return int(found[1]) * 1024
    return None


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for the body, and restore its random state afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
