"""Records in ``hisvd.json`` which files of a folder hisvd wrote, with their hashes.

This distinguishes them from files that a user added or edited, such as ``LICENSE`` or the card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hisvd_cli.utils.files.fingerprints import content_digest
from hisvd_cli.utils.files.json_files import read_json, write_json

PROVENANCE = "hisvd.json"
Describe = Callable[[Path, Mapping[str, Any]], None]
"""Writes the model card of a folder from its record."""
FILES = "files"
"""Key of the file hashes in the record."""


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``hisvd.json``, with the hashes of all other files except weights.

    Must be called after all other files were written. Raises OutputError.
    """
    write_json(folder / PROVENANCE, {**record, FILES: _hashes(folder)})


def renew_record(folder: Path, name: str, before: str) -> None:
    """Update the hash of a file that hisvd rewrote, unless the user had changed the file before.

    Args:
        folder: folder of the file.
        name: name of the file.
        before: its :func:`content_hash` before it was rewritten.

    Raises:
        OutputError: the record cannot be written.
    """
    record = read_record(folder)
    if recorded(record).get(name) == before:
        files = {**recorded(record), name: content_hash(folder / name)}
        write_json(folder / PROVENANCE, {**record, FILES: files})


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of ``hisvd.json`` in a folder; empty if it cannot be read."""
    return read_object(folder / PROVENANCE)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it is a link, unreadable or not an object."""
    try:
        document = {} if path.is_symlink() else read_json(path, strict=False)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def recorded(record: Mapping[str, Any]) -> dict[str, str]:
    """Return file name → hash of a record; empty for records of older versions."""
    files = record.get(FILES)
    return files if isinstance(files, dict) else {}


def content_hash(path: Path) -> str:
    """Return the sha256 of a file; '' if it cannot be read."""
    try:
        if not path.is_file():  # reading a pipe would block
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
