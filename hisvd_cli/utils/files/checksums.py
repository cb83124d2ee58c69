"""Checksums of files that an interrupted run leaves: what was damaged since is made again.

A safetensors file that hisvd writes holds the XXH3 hash of all its other bytes, as the first entry
of its metadata. So it stands at a fixed place, and a file and its checksum appear together. A
file of another kind, or a folder (the files directly in it), is sealed: the hashes are written
beside the file, or into the folder.
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
"""Stands in the place of the checksum while the bytes are hashed."""
SEAL = ".seal"

_START = f'{{"__metadata__":{{"{KEY}":"'.encode()
PLACE = 8 + len(_START)
"""Where in a file the checksum stands."""
_CHUNK = 1 << 20
_WRITTEN: set[tuple[int, ...]] = set()


def remember(path: Path) -> None:
    """Note that this process has just written a file, so that it need not be read for a check."""
    _WRITTEN.add(_identity(path))


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def intact(path: Path) -> bool:
    """Tell whether a safetensors file is there and holds every byte that hisvd wrote."""
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
    except OSError:  # absent, or it cannot be read: both mean making it again
        return False
    return start[8:PLACE] == _START and found == state.hexdigest().encode()


def text_checksum(text: str) -> str:
    """Return the checksum of a text."""
    return xxh3_64(text.encode()).hexdigest()


def seal(path: Path) -> None:
    """Write down the checksums of a finished folder's files, or of one file.

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
    """Tell whether a folder or file was sealed, and holds what it held then; files that came into
    the folder later do not count."""
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
