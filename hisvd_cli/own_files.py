"""Which files hisvd wrote: what may be replaced, and what belongs to somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hisvd_cli.checkpoint import PLAN_FILE, PROVENANCE
from hisvd_cli.companions import is_companion
from hisvd_cli.errors import SourceError
from hisvd_cli.json_files import read_json
from hisvd_cli.model_card import CARD
from hisvd_cli.source import code_modules, names_own_loader
from hisvd_cli.weights import INDEX, SINGLE, shard_files

KINDS = ("checkpoint", "dense")
"""What ``hisvd.json`` says of a folder that hisvd wrote."""
_WRITTEN = ("config.json", INDEX, PROVENANCE, PLAN_FILE, CARD)


def is_own_folder(folder: Path) -> bool:
    """Tell whether hisvd wrote a checkpoint or a dense model into a folder: its record says so."""
    record = _record(folder / PROVENANCE)
    return record.get("kind") in KINDS and all(
        isinstance(record.get(key), dict) for key in ("model", "versions")
    )


def written_files() -> list[str]:
    """Return the names of what hisvd writes beside weights."""
    from hisvd_cli.transformers_plugin import remote_code_files

    return [*_WRITTEN, *remote_code_files()]


def foreign_files(folder: Path) -> Iterator[Path]:
    """Yield what hisvd did not write among the entries of a checkpoint's folder; of weights, all
    but those that its index lists."""
    written = {*written_files(), *_carried_code(folder), *_weight_files(folder)}
    for path in sorted(folder.iterdir()):
        known = path.name in written or is_companion(path.name)
        if not known or path.is_symlink() or not path.is_file():
            yield path


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX
    try:
        return shard_files(index) if index.exists() else [SINGLE]
    except SourceError:  # a damaged index lists nothing
        return []


def _record(path: Path) -> dict[str, Any]:
    try:
        document = {} if path.is_symlink() else read_json(path, strict=False)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _carried_code(folder: Path) -> list[str]:
    """Return the names of the Python files that a checkpoint took over from its base model."""
    config = _record(folder / "config.json")
    carries = code_modules(config) and not names_own_loader(config)
    return [path.name for path in folder.glob("*.py")] if carries else []
