"""Names of devices and dtypes ─► torch's, with a word on what ``auto`` means."""

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
    """Return the device called ``name``; ``auto`` is the GPU where there is one, and each of
    several processes has its own.

    Raises:
        UsageError: no such device here, or not one for each process.
    """
    name = own_gpu(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # 'meta' is a device too, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"There is no device '{name}' here.", "Use --device cpu, cuda, cuda:1, mps or auto."
        ) from error
    return device


def pick_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """Return the dtype for forward passes.

    ``auto`` is the dtype of the weights on disk where this device multiplies it at least as fast
    as float32, else float32. It is float32 too for float16 on a CPU, which overflows on many
    models, and for anything that no forward pass runs in.
    """
    dtype = _RUNNABLE.get(stored if name == "auto" else name, torch.float32)
    if name != "auto" or dtype.itemsize >= torch.float32.itemsize:
        return dtype
    overflows = dtype == torch.float16 and device.type == "cpu"
    slow = overflows or not as_fast_as_float32(dtype, device)
    return torch.float32 if slow else dtype


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has left, or None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if known.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", known.read_text())):
        return int(found[1]) * 1024
    return None


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch while the body runs, and put its state back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
