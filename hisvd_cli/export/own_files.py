"""Distinguishes files that hisvd wrote, and may replace, from files of the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.modeling.checkpoints.folder_record import (
    PROVENANCE,
    content_hash,
    read_object,
    read_record,
    recorded,
)
from hisvd_cli.modeling.sources.companions import CARD, is_companion
from hisvd_cli.modeling.sources.source import code_modules, names_own_loader
from hisvd_cli.modeling.sources.weights import INDEX, SINGLE, shard_files
from hisvd_cli.utils.errors import SourceError

KINDS = ("checkpoint", "dense")
"""Values of ``kind`` in ``hisvd.json``."""
_WRITTEN = ("config.json", INDEX, PROVENANCE, PLAN_FILE, CARD)


def is_own_folder(folder: Path) -> bool:
    """Return whether ``hisvd.json`` identifies a folder as a checkpoint or dense model of hisvd."""
    record = read_record(folder)
    return record.get("kind") in KINDS and all(
        isinstance(record.get(key), dict) for key in ("model", "versions")
    )


def written_files() -> list[str]:
    """Return the names of the files that hisvd writes besides weights."""
    from hisvd_cli.modeling.layers.transformers_plugin import remote_code_files

    return [*_WRITTEN, *remote_code_files()]


def foreign_files(folder: Path) -> Iterator[Path]:
    """Yield the entries of a checkpoint folder that hisvd did not write. Weight files count as
    written by hisvd only if the index lists them."""
    always = {PROVENANCE, *_weight_files(folder)}
    files = recorded(read_record(folder))
    is_ours = partial(_is_recorded, files) if files else _by_name(folder)
    for path in sorted(folder.iterdir()):
        regular = path.is_file() and not path.is_symlink()
        if not regular or not (path.name in always or is_ours(path)):
            yield path


def _is_recorded(files: Mapping[str, str], path: Path) -> bool:
    return bool(files.get(path.name)) and files[path.name] == content_hash(path)


def _by_name(folder: Path) -> Callable[[Path], bool]:
    """Return a predicate on file names, for records without hashes."""
    names = {*written_files(), *_carried_code(folder)}
    return lambda path: path.name in names or is_companion(path.name)


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX
    try:
        return shard_files(index) if index.exists() else [SINGLE]
    except SourceError:  # a damaged index
        return []


def _carried_code(folder: Path) -> list[str]:
    """Return the names of the Python files that a checkpoint copied from its base model."""
    config = read_object(folder / "config.json")
    carries = code_modules(config) and not names_own_loader(config)
    return [path.name for path in folder.glob("*.py")] if carries else []
