"""Checksums of intermediate files, so that a resumed run rebuilds damaged ones.

A safetensors file written by hisvd contains the XXH3 hash of all its other bytes as the first
metadata entry, at a fixed position; file and checksum are written together. Other files and
folders (the files directly in them) are sealed: the hashes are stored beside the file or in the
folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from xxhash import xxh3_64

from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.json_files import read_json

KEY = "checksum"
"""Name of the checksum in the metadata of a safetensors file."""
BLANK = "0" * xxh3_64().digest_size * 2
"""Placeholder for the checksum while the bytes are hashed."""
SEAL = ".seal"

_START = f'{{"__metadata__":{{"{KEY}":"'.encode()
PLACE = 8 + len(_START)
"""Offset of the checksum in a file."""
_CHUNK = 1 << 20
_WRITTEN: set[tuple[int, ...]] = set()


def remember(path: Path) -> None:
    """Record that this process has just written a file, so that :func:`intact` need not read it."""
    _WRITTEN.add(_identity(path))


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def intact(path: Path) -> bool:
    """Return whether a safetensors file exists and its checksum matches."""
    try:
        if _identity(path) in _WRITTEN:
            return True
        with path.open("rb") as file:
            start = bytearray(file.read(PLACE + len(BLANK)))
            found = bytes(start[PLACE:])
            start[PLACE:] = BLANK.encode()
            state = xxh3_64(start)
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    except OSError:  # missing or unreadable: it has to be rebuilt
        return False
    return start[8:PLACE] == _START and found == state.hexdigest().encode()


def text_checksum(text: str) -> str:
    """Return the XXH3 checksum of a text, in hexadecimal."""
    return xxh3_64(text.encode()).hexdigest()


def seal(path: Path) -> None:
    """Store the checksums of the files of a finished folder, or of one file.

    Raises:
        OutputError: they cannot be written.
    """
    mark = _mark(path)
    try:
        mark.write_text(json.dumps(_checksums(path)), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"Cannot write {mark}: {error.strerror}.", "Free some space or choose another folder."
        ) from error


def sealed(path: Path) -> bool:
    """Return whether a folder or file is sealed and unchanged; files added to a folder after
    sealing are ignored."""
    try:
        kept = read_json(_mark(path))
        found = _checksums(path)
        return bool(kept) and kept.items() <= found.items()
    except (OSError, ValueError, AttributeError):
        return False


def _mark(path: Path) -> Path:
    return path / SEAL if path.is_dir() else path.with_name(f".{path.name}{SEAL}")


def _checksums(path: Path) -> dict[str, str]:
    files = [p for p in sorted(path.iterdir()) if p.is_file()] if path.is_dir() else [path]
    return {file.name: _checksum(file) for file in files if file.name != SEAL}


def _checksum(path: Path) -> str:
    state = xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
