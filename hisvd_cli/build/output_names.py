"""Names of outputs as the user gave them ─► paths that can be written beside every input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hisvd_cli.errors import OutputError, UsageError
from hisvd_cli.profile import Resolved
from hisvd_cli.tensorfile import reason

_SIBLING_BYTES = 48
"""Longest addition to a name: temporary files and unfinished folders stand beside an output."""
_NAME_BYTES = 255
_FILES = {
    *(".pt", ".pth", ".bin", ".safetensors", ".gguf", ".ckpt", ".onnx", ".npz", ".pkl", ".pickle"),
    *(".json", ".jsonl", ".toml", ".txt", ".md", ".csv", ".html", ".zip", ".tar", ".gz", ".zst"),
}


def output_name(path: Path, flag: str = "--output") -> Path:
    """Return a path as it was given on the command line, ``~`` expanded.

    Raises:
        OutputError: no file or folder can be called so.
    """
    name_another = f"Give another path with {flag}."
    try:
        expanded = path.expanduser()
        resolved = expanded.resolve()
        if resolved.is_symlink():  # resolving stops without an error at a loop, from Python 3.13 on
            raise OutputError(f"{flag} {path} is a loop of symbolic links.", name_another)
        resolved.exists()
    except OSError as error:
        raise OutputError(f"{flag} {path} cannot be used: {reason(error)}", name_another) from error
    except (RuntimeError, ValueError) as error:  # no such user, a loop of links, a NUL
        raise OutputError(f"{flag} {path} cannot be used: {reason(error)}", name_another) from error
    if not resolved.name:
        raise OutputError(f"{flag} {path} is the root of the file system.", name_another)
    size, most = len(os.fsencode(resolved.name)), _NAME_BYTES - _SIBLING_BYTES
    if size > most:
        raise OutputError(
            f"The name of {flag} {resolved.name[:20]}… has {size} bytes; at most {most} fit beside "
            "its temporary files.",
            "Give a shorter name.",
        )
    return expanded


def check_form(path: Path, flag: str = "--output") -> None:
    """Refuse the name of a file for a folder of weights.

    Raises:
        UsageError: a name that ends like a file's, and is not ``.pt``.
    """
    if path.suffix != ".pt" and path.suffix.lower() in _FILES and not path.is_dir():
        raise UsageError(
            f"{flag} {path} ends in {path.suffix}, but is to be a folder.",
            "Give a folder, or one file that ends in .pt.",
        )


def inputs_of(resolved: Resolved, *more: Path | str | None) -> list[Path]:
    """Return the files and folders that a run reads: those of its settings, and ``more``."""
    settings = resolved.settings
    named = (
        settings.model.name,
        settings.calibration.path,
        settings.calibration.dataset,
        settings.recover.dataset,
        *settings.eval.dataset,
        *more,
    )
    return [path for name in named if name and (path := _existing(str(name)))]


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no path, so nothing that could be lost
        return None


def refuse_inputs(output: Path, inputs: Iterable[Path], flag: str = "--output") -> None:
    """Refuse an output that is an input, lies in one, or holds one; links are followed.

    Raises:
        OutputError: it is.
    """
    target = output.resolve()
    for path in inputs:
        read = path.resolve()
        same = target == read or (target.exists() and target.samefile(read))
        inside = read.is_dir() and read in target.parents
        if same or inside or target in read.parents:
            where = "is" if same else "lies in" if inside else "holds"
            raise OutputError(
                f"{flag} {output} {where} the input {path}.", "Give a path outside of the input."
            )
