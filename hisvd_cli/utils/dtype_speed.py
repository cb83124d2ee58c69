"""Measures whether a device multiplies in half precision at least as fast as in float32.

Processors without bfloat16 instructions emulate them, up to fifty times slower than float32. One
small product per dtype is timed; the result is cached for each kind of machine.
"""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.fingerprints import cache_root, digest
from hisvd_cli.utils.files.json_files import read_json, write_json
from hisvd_cli.utils.files.safetensors_header import dtype_name

_RUNS = 3
_HOPELESS = 4.0  # slowdown beyond which no further runs are timed
_known: dict[tuple[str, torch.dtype], bool] = {}


def as_fast_as_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products in ``dtype`` take no longer than in float32 on ``device``.

    Measured once per kind of machine, or once per process if the cache cannot be written.
    """
    key = (device.type, dtype)
    if key not in _known:
        _known[key] = _recorded(dtype, device)
    return _known[key]


def share_measurements(device: torch.device) -> None:
    """Share the first process's measurements with all others, so that all run in one dtype.

    Raises:
        LostProcessError: a process died.
    """
    kinds = (torch.bfloat16, torch.float16)
    answers = world().agreed(lambda: [as_fast_as_float32(kind, device) for kind in kinds])
    _known.update(zip(((device.type, kind) for kind in kinds), answers, strict=True))


def _recorded(dtype: torch.dtype, device: torch.device) -> bool:
    """Return the cached result; measure and store it if there is none."""
    machine = _machine(device)
    name = dtype_name(dtype)
    path = cache_root() / "machine" / f"{digest(name, *machine.values())[:16]}.json"
    with suppress(OSError, ValueError):
        known = read_json(path)
        if isinstance(known, dict) and isinstance(known.get("as_fast"), bool):
            return bool(known["as_fast"])
    half, single = _times(dtype, device)
    as_fast = half <= single
    record = {"as_fast": as_fast, "dtype": name, "seconds": half, "float32_seconds": single}
    with suppress(OutputError):  # without a record, the next process measures again
        write_json(path, {**record, **machine})
    return as_fast


def _machine(device: torch.device) -> dict[str, str]:
    """Return the properties that the speed depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """Return the processor's name, with a hash of its instruction sets if the system lists them."""
    known = Path("/proc/cpuinfo")
    if not known.is_file():
        return f"{platform.machine()} {platform.processor()}"
    pairs = [line.split(":", 1) for line in known.read_text(errors="replace").splitlines()]
    facts = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    flags = facts.get("flags", facts.get("Features", ""))
    return f"{facts.get('model name', platform.machine())} {digest(flags)[:8]}"


def _times(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return the seconds of one product in ``dtype`` and in float32, each the best of a few."""
    rows, width = (128, 512) if device.type == "cpu" else (2048, 2048)
    single = [torch.ones(rows, width, device=device), torch.ones(width, width, device=device)]
    half = [matrix.to(dtype) for matrix in single]
    for pair in (half, single):  # warm-up: loads libraries, selects algorithms
        _seconds(pair)
    halves, singles = [], []
    for _ in range(_RUNS):
        singles.append(_seconds(single))
        halves.append(_seconds(half))
        if halves[-1] > _HOPELESS * max(singles):
            break
    return min(halves), min(singles)


def _seconds(pair: list[Tensor]) -> float:
    left, right = pair
    left[0, 0].item()  # waits for pending GPU work
    started = time.perf_counter()
    (left @ right)[0, 0].item()
    return time.perf_counter() - started
