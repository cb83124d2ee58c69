"""What every run that writes a checkpoint asks: what may stand there, and what it took."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from pathlib import Path

import psutil
import torch

from hisvd_cli.checkpoint import PROVENANCE, is_checkpoint
from hisvd_cli.errors import OutputError, UsageError
from hisvd_cli.profile import Resolved
from hisvd_cli.settings import SECTIONS, flag_of


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way, before any work.

    ``--overwrite`` only ever replaces what hisvd wrote.

    Raises:
        OutputError: something stands there, or nothing can be written there.
    """
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise OutputError(f"Cannot write into {home}.", "Name another --output.")
    if path.suffix == ".pt":
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError(f"{path} exists.", "Pass --overwrite, or name another --output.")
        return
    if path.is_file():
        raise OutputError(f"{path} is a file.", "Name a folder, or a file that ends in .pt.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"The folder {path} is not empty.", "Pass --overwrite, or name another --output."
        )
    if not is_checkpoint(path) and not (path / PROVENANCE).is_file():
        raise OutputError(
            f"The folder {path} holds something that hisvd did not write.",
            "Name another --output, or remove the folder yourself.",
        )


def refuse_flags(
    resolved: Resolved, section: str, decided: str, instead: str, but: Collection[str] = ()
) -> None:
    """Raise UsageError for a flag of a section that something else has decided already.

    Args:
        resolved: the settings.
        section: whose flags.
        decided: what a flag cannot change.
        instead: what to do to have it changed.
        but: keys that may be set.
    """
    for key in SECTIONS[section].model_fields:
        if key not in but and resolved.is_flag(section, key):
            flag = flag_of(section, key)
            raise UsageError(f"{flag} cannot change {decided}.", f"Leave out {flag}, or {instead}.")


def peak_memory() -> int:
    """Return the process's peak memory in bytes: resident, plus what CUDA allocated."""
    return _peak_resident() + (
        torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    )


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    # What getrusage reports on Linux includes the process that started this one.
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
