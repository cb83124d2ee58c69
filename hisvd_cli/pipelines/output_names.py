"""Names of outputs as the user gave them ─► paths that can be written beside every input."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.utils.errors import OutputError, UsageError, reason
from hisvd_cli.utils.files.cache import expanded
from hisvd_cli.utils.files.scratch import BUILDING

_SIBLING_BYTES = 56
"""Longest addition to a name: temporary files and unfinished folders stand beside an output."""
_NAME_BYTES = 255
_PATH_BYTES = 4095
_INNER_BYTES = 255
"""Longest path in an unfinished folder."""
_FILES = {
    *(".pt", ".pth", ".bin", ".safetensors", ".gguf", ".ggml", ".ckpt", ".onnx", ".npy", ".npz"),
    *(".pkl", ".pickle", ".h5", ".msgpack", ".tflite", ".parquet", ".json", ".jsonl", ".toml"),
    *(".yaml", ".yml", ".txt", ".md", ".csv", ".html", ".zip", ".tar", ".tgz", ".gz", ".bz2"),
    *(".xz", ".zst", ".7z"),
}


def output_name(path: Path, setting: str = "output") -> Path:
    """Return a path as it was given on the command line, ``~`` expanded.

    Raises:
        OutputError: no file or folder can be called so.
    """
    name_another = f"Give another path with `{setting}`."
    try:
        named = path.expanduser()
        resolved = named.resolve()
        if resolved.is_symlink():  # resolving stops without an error at a loop, from Python 3.13 on
            raise OutputError(f"`{setting}` {path} is a loop of symbolic links.", name_another)
        resolved.exists()
    except OSError as error:
        raise OutputError(
            f"`{setting}` {path} cannot be used: {reason(error)}", name_another
        ) from error
    except (RuntimeError, ValueError) as error:  # no such user, a loop of links, a NUL
        raise OutputError(
            f"`{setting}` {path} cannot be used: {reason(error)}", name_another
        ) from error
    if not resolved.name:
        raise OutputError(f"`{setting}` {path} is the root of the file system.", name_another)
    size, most = len(os.fsencode(resolved.name)), _NAME_BYTES - _SIBLING_BYTES
    if size > most:
        raise OutputError(
            f"The name of `{setting}` {resolved.name[:20]}… has {size} bytes; at most {most} fit "
            "beside its temporary files.",
            f"Give a shorter name with `{setting}`.",
        )
    if len(os.fsencode(resolved)) > _PATH_BYTES - _SIBLING_BYTES - _INNER_BYTES:
        raise OutputError(f"The path of `{setting}` {path.name} is too long.", name_another)
    return named


def check_place(path: Path, setting: str = "output") -> None:
    """Refuse a place where no folder of weights, or file of them, can take its name at the end.

    Raises:
        UsageError: the name of another kind of file.
        OutputError: no such name can be, it is in use, or nothing can be written there.
    """
    output_name(path, setting)  # a name that the user did not give may be too long as well
    check_form(path, setting)
    target, another = path.resolve(), f"Give another path with `{setting}`."
    here = Path.cwd()
    if target in (here, *here.parents):
        what = "is the current folder" if target == here else "holds the current folder"
        raise OutputError(f"`{setting}` {path} {what}, which cannot be replaced.", another)
    if os.path.ismount(target):
        raise OutputError(
            f"`{setting}` {path} is a mount point, which cannot be replaced.",
            f"Name a folder in it with `{setting}`.",
        )
    home = next(folder for folder in target.parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise OutputError(f"Cannot write into {home}.", another)


def check_form(path: Path, setting: str = "output") -> None:
    """Refuse the name of a file for a folder of weights.

    Raises:
        UsageError: a name that ends like a file's, and is not ``.pt`` as an ``output`` may be.
    """
    single = path.suffix == ".pt" and setting == "output"
    if not single and path.suffix.lower() in _FILES and not path.is_dir():
        form = ", or one file that ends in .pt" if setting == "output" else ""
        raise UsageError(
            f"`{setting}` {path} ends in {path.suffix}, but must be a folder.",
            f"Give a folder{form}.",
        )


def inputs_of(resolved: Resolved, *more: Path | str | None) -> list[Path]:
    """Return the files and folders that a run reads: those of its settings, and ``more``."""
    settings = resolved.settings
    named = (
        settings.model.name,
        settings.calibration.dataset,
        settings.recover.dataset,
        *settings.eval.dataset,
        *more,
    )
    found = [path for name in named if name and (path := _existing(str(name)))]
    # Where there is no calibration yet, the run makes it before it writes its output.
    return found + [expanded(path) for path in (settings.calibration.path,) if path]


def _existing(name: str) -> Path | None:
    try:
        path = expanded(name)
        return path if path.exists() else None
    except (OSError, ValueError):  # no path, so nothing that could be lost
        return None


def refuse_inputs(output: Path, inputs: Iterable[Path], setting: str = "output") -> None:
    """Refuse an output that is an input, lies in one, or holds one; links are followed.

    Raises:
        OutputError: it is; or an input is a temporary folder of the output.
    """
    target = output.resolve()
    beside = re.compile(rf"\.{re.escape(target.name)}\.({BUILDING})")
    for path in inputs:
        read = path.resolve()
        where = ""
        if _same(target, read):
            where = "is"
        elif not read.is_file() and any(_same(folder, read) for folder in target.parents):
            where = "lies in"
        elif any(_same(target, folder) for folder in read.parents):
            where = "holds"
        elif any(
            beside.fullmatch(each.name) and _same(each.parent, target.parent)
            for each in (read, *read.parents)
        ):
            where = "has temporary files that would replace"
        if where:
            raise OutputError(
                f"`{setting}` {output} {where} the input {path}.", "Give a path outside the input."
            )


def _same(one: Path, other: Path) -> bool:
    """Tell whether two resolved paths lead to the same place, be it by a hard link or a mount."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
