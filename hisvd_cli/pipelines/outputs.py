"""Checks of output paths, and the peak memory of a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil
import torch

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.export.own_files import foreign_files, is_own_folder
from hisvd_cli.inspection.pt_files import load_pt
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.modeling.checkpoints.folder_record import read_record, recorded
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import SECTIONS
from hisvd_cli.pipelines.output_names import check_place, inputs_of, refuse_inputs
from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
from hisvd_cli.utils.errors import OutputError, SourceError, UsageError
from hisvd_cli.utils.files.artifact import standing_at
from hisvd_cli.utils.files.fingerprints import ratio_name, slug


def output_path(resolved: Resolved, output: Path | None, plan_file: Path | None) -> Path:
    """Return the path of the checkpoint: the named one, or else ``MODEL-RATIO`` in the current
    folder, for a bytes ratio ``MODEL-bytes-RATIO``. A given plan decides the ratio.

    Raises:
        SourceError: ``plan_file`` is not a plan.
    """
    if output is not None:
        return output
    by_bytes = bytes_ratio(resolved) if plan_file is None else None
    kept = resolved.settings.plan.ratio[0]
    if plan_file is not None:
        plan = load_plan(plan_file)
        by_bytes, kept = plan.bytes.ratio if plan.bytes else None, plan.ratio
    ratio = ratio_name(kept) if by_bytes is None else f"bytes-{ratio_name(by_bytes)}"
    return Path(f"{slug(resolved.settings.model.name)}-{ratio}")


def check_output(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check before any work that a checkpoint can be written to a path. Only files that hisvd
    wrote are ever overwritten.

    Args:
        path: a folder, or a file that ends in ``.pt``.
        overwrite: whether an existing checkpoint may be replaced.
        inputs: the files and folders that the run reads.

    Raises:
        UsageError: the name is that of another kind of file.
        OutputError: the path exists, is an input, or cannot be written.
    """
    refuse_inputs(path, inputs)
    check_place(path)
    if path.suffix == ".pt":
        _check_file(path, overwrite)
    else:
        _check_folder(path, overwrite)


def _check_file(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_file():
        raise OutputError(f"{path} is not a regular file.", "Name another `output`.")
    if not overwrite:
        raise OutputError(f"{path} exists.", "Pass `overwrite`, or name another `output`.")
    try:
        load_pt(path)
    except SourceError as error:
        raise OutputError(
            f"{path} holds something that hisvd did not write.",
            "Name another `output`, or remove the file yourself.",
        ) from error


def _check_folder(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        kind = "a file" if path.is_file() else "not a folder"
        raise OutputError(f"{path} is {kind}.", "Name a folder, or a file that ends in .pt.")
    existing = standing_at(path)
    if not existing.is_dir() or not any(existing.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"The folder {path} is not empty.", "Pass `overwrite`, or name another `output`."
        )
    if not is_own_folder(existing):
        raise OutputError(
            f"The folder {path} holds something that hisvd did not write.",
            "Name another `output`, or remove the folder yourself.",
        )
    if other := next(foreign_files(existing), None):
        changed = other.name in recorded(read_record(existing))
        how = "was changed since hisvd wrote it" if changed else "hisvd did not write"
        raise OutputError(
            f"The folder {path} also contains {other.name}, which {how}.",
            "Move it elsewhere, or name another `output`.",
        )


def check_plan_output(path: Path, overwrite: bool, argument: str = "output") -> None:
    """Check that a plan can be written to a path. Only plans that are not part of a checkpoint
    are overwritten.

    Args:
        path: the file.
        overwrite: whether an existing plan may be replaced.
        argument: the argument that names the file.

    Raises:
        OutputError: the path exists and may not be replaced.
    """
    if not path.exists():
        return
    if not overwrite:
        raise OutputError(f"{path} exists.", f"Pass `overwrite`, or name another `{argument}`.")
    try:
        load_plan(path)
    except SourceError as error:
        raise OutputError(
            f"{path} exists and is not a plan.",
            f"Name another `{argument}`, or remove it yourself.",
        ) from error
    file = path.resolve()
    if file.name == PLAN_FILE and is_own_folder(file.parent):
        raise OutputError(
            f"{path} is the plan of the checkpoint {file.parent}.", f"Name another `{argument}`."
        )


def check_place_of(
    resolved: Resolved, source: Source, path: Path, plan_file: Path | None, overwrite: bool
) -> None:
    """Check that writing a checkpoint to ``path`` overwrites nothing else.

    Raises:
        UsageError, OutputError: see :func:`check_output`.
    """
    check_output(path, overwrite, inputs_of(resolved, source.folder, plan_file))
    beside = plan_beside(path)
    given = plan_file is not None and beside.exists() and beside.samefile(plan_file)
    if path.suffix == ".pt" and not given:
        check_plan_output(beside, overwrite)


def plan_beside(path: Path) -> Path:
    """Return the path of the plan of a single-file checkpoint."""
    return path.with_suffix(".plan.json")


def plan_of(path: Path) -> Path:
    """Return the path of the plan of a checkpoint, in its folder or beside its file."""
    return plan_beside(path) if path.suffix == ".pt" else path / PLAN_FILE


def refuse_flags(
    resolved: Resolved, section: str, decided: str, instead: str, but: Collection[str] = ()
) -> None:
    """Raise UsageError if a flag of a section is given that has no effect.

    Args:
        resolved: the settings.
        section: the section.
        decided: what the flag cannot change, for the error.
        instead: what to do to change it, for the hint.
        but: keys that may be given.
    """
    for key in SECTIONS[section].model_fields:
        if key not in but and resolved.is_flag(section, key):
            opposite = "no " if resolved.value(section, key) is False else ""
            setting = f"`{opposite}{section}.{key}`"
            raise UsageError(
                f"{setting} cannot change {decided}.", f"Leave out {setting}, or {instead}."
            )


def peak_memory() -> int:
    """Return the peak memory of the process in bytes: resident, plus CUDA allocations."""
    return _peak_resident() + (
        torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    )


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    # On Linux, getrusage includes the process that started this one.
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
