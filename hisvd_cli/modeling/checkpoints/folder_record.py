"""What ``hisvd.json`` says of the files beside it, so that nobody's work is taken for hisvd's.

A checkpoint's small files have common names: a user puts a ``LICENSE`` there, or edits the card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hisvd_cli.utils.files.fingerprints import content_digest
from hisvd_cli.utils.files.json_files import read_json, write_json

PROVENANCE = "hisvd.json"
Describe = Callable[[Path, Mapping[str, Any]], None]
"""Writes the model card of a folder, from its record."""
FILES = "files"
"""The part of the record that says what lies beside it, and not what it was made of."""


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``hisvd.json``, with a hash of every other file of the folder that holds no weights.

    It comes last: it says what the folder holds. Raises OutputError.
    """
    write_json(folder / PROVENANCE, {**record, FILES: _hashes(folder)})


def renew_record(folder: Path, name: str, before: str) -> None:
    """Record a file that hisvd wrote again, unless somebody else had changed it.

    Args:
        folder: whose.
        name: of the file.
        before: its :func:`content_hash` ahead of that.

    Raises:
        OutputError: the record cannot be written.
    """
    record = read_record(folder)
    if recorded(record).get(name) == before:
        files = {**recorded(record), name: content_hash(folder / name)}
        write_json(folder / PROVENANCE, {**record, FILES: files})


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``hisvd.json`` of a folder says, empty where there is nothing to be read."""
    return read_object(folder / PROVENANCE)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, empty for a link, or where there is no such thing."""
    try:
        document = {} if path.is_symlink() else read_json(path, strict=False)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def recorded(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of a record by the files' names, empty for one of an older hisvd."""
    files = record.get(FILES)
    return files if isinstance(files, dict) else {}


def content_hash(path: Path) -> str:
    """Return the sha256 of a file, '' where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would never end
            return ""
        return content_digest(path)
    except OSError:
        return ""


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: content_hash(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != PROVENANCE and path.suffix != ".safetensors"
    }
