"""Checks of output paths: names, permissions, and overlap with inputs."""

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
"""Longest suffix of temporary files and unfinished folders, which are beside an output."""
_NAME_BYTES = 255
_PATH_BYTES = 4095
_INNER_BYTES = 255
"""Longest path inside an unfinished folder."""
_FILES = {
    *(".pt", ".pth", ".bin", ".safetensors", ".gguf", ".ggml", ".ckpt", ".onnx", ".npy", ".npz"),
    *(".pkl", ".pickle", ".h5", ".msgpack", ".tflite", ".parquet", ".json", ".jsonl", ".toml"),
    *(".yaml", ".yml", ".txt", ".md", ".csv", ".html", ".zip", ".tar", ".tgz", ".gz", ".bz2"),
    *(".xz", ".zst", ".7z"),
}


def output_name(path: Path, setting: str = "output") -> Path:
    """Return an output path with ``~`` expanded.

    Args:
        path: the path as given.
        setting: name of its argument or key of its setting, for errors.

    Raises:
        OutputError: no file or folder can have this path.
    """
    name_another = f"Give another path with `{setting}`."
    try:
        named = path.expanduser()
        resolved = named.resolve()
        if resolved.is_symlink():  # from Python 3.13, a loop raises no error
            raise OutputError(f"`{setting}={path}` is a loop of symbolic links.", name_another)
        resolved.exists()
    except OSError as error:
        raise OutputError(
            f"`{setting}={path}` cannot be used: {reason(error)}", name_another
        ) from error
    except (RuntimeError, ValueError) as error:  # unknown user, loop of links, or NUL
        raise OutputError(
            f"`{setting}={path}` cannot be used: {reason(error)}", name_another
        ) from error
    if not resolved.name:
        raise OutputError(f"`{setting}={path}` is the root of the file system.", name_another)
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
    """Check that a folder, or file, of weights can be written to a path.

    Raises:
        UsageError: the name is that of another kind of file.
        OutputError: the path is invalid, cannot be replaced, or is not writable.
    """
    output_name(path, setting)  # a default name may be too long as well
    check_form(path, setting)
    target, another = path.resolve(), f"Give another path with `{setting}`."
    here = Path.cwd()
    if target in (here, *here.parents):
        what = "is the current folder" if target == here else "contains the current folder"
        raise OutputError(f"`{setting}={path}` {what}, which cannot be replaced.", another)
    if os.path.ismount(target):
        raise OutputError(
            f"`{setting}={path}` is a mount point, which cannot be replaced.",
            f"Name a folder in it with `{setting}`.",
        )
    home = next(folder for folder in target.parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise OutputError(f"Cannot write into {home}.", another)


def check_form(path: Path, setting: str = "output") -> None:
    """Check that the name of a folder of weights is not that of a file.

    Raises:
        UsageError: the name has a file suffix, other than ``.pt`` for ``output``.
    """
    single = path.suffix == ".pt" and setting == "output"
    if not single and path.suffix.lower() in _FILES and not path.is_dir():
        form = ", or one file that ends in .pt" if setting == "output" else ""
        raise UsageError(
            f"`{setting}={path}` ends in {path.suffix}, but must be a folder.",
            f"Give a folder{form}.",
        )


def inputs_of(resolved: Resolved, *more: Path | str | None) -> list[Path]:
    """Return the files and folders that a run reads: those of the settings, and ``more``."""
    settings = resolved.settings
    named = (
        settings.model.name,
        settings.calibration.dataset,
        settings.recover.dataset,
        *settings.eval.dataset,
        *more,
    )
    found = [path for name in named if name and (path := _existing(str(name)))]
    # A missing calibration is an input too: the run makes it before it writes its output.
    return found + [expanded(path) for path in (settings.calibration.path,) if path]


def _existing(name: str) -> Path | None:
    try:
        path = expanded(name)
        return path if path.exists() else None
    except (OSError, ValueError):  # not a path, so nothing can be lost
        return None


def refuse_inputs(output: Path, inputs: Iterable[Path], setting: str = "output") -> None:
    """Check that an output is not an input, inside one, or a parent of one; links are followed.

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
            where = "is inside"
        elif any(_same(target, folder) for folder in read.parents):
            where = "contains"
        elif any(
            beside.fullmatch(each.name) and _same(each.parent, target.parent)
            for each in (read, *read.parents)
        ):
            where = "has temporary files that would replace"
        if where:
            raise OutputError(
                f"`{setting}={output}` {where} the input {path}.", "Give a path outside the input."
            )


def _same(one: Path, other: Path) -> bool:
    """Return whether two resolved paths are the same, also by a hard link or a mount."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
