"""File hashes, and names derived from models and ratios."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from hisvd_cli.utils.errors import OutputError, SourceError, reason
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.cache import cache_root, expanded

__all__ = [
    "cache_root",
    "content_digest",
    "digest",
    "expanded",
    "file_digest",
    "ratio_name",
    "slug",
]

_CHUNK = 1 << 20
_SLUG = 100  # characters; leaves room for prefixes and suffixes in a file name
_DIGEST = re.compile(rb"[0-9a-f]{64}")


def slug(text: str) -> str:
    """Return ``text`` as a short file name of letters, digits, dots and dashes."""
    stem = Path(text.rstrip("/")).name or text
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", stem.removesuffix(".gguf")).strip("-.")
    return plain[:_SLUG].rstrip("-.") or "model"


def ratio_name(ratio: float) -> str:
    """Return a ratio as used in names: as short as possible, and distinct for every ratio."""
    short = f"{ratio:g}"
    return short if float(short) == ratio else repr(ratio)


def digest(*parts: str | bytes) -> str:
    """Return the sha256 of ``parts``, each prefixed with its length to keep them separate."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(f"{len(data)}:".encode() + data)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, cached until the file changes.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        record = _digest_record(path)
        with suppress(OSError):  # missing or unreadable
            if _DIGEST.fullmatch(known := record.read_bytes()):
                return known.decode()
        found = content_digest(path)
    except OSError as error:
        raise SourceError(
            f"Cannot read {path}: {reason(error)}", "Check that the file exists and is readable."
        ) from error
    with suppress(OutputError):  # without a record the file is hashed again next time
        write_text(record, found)
    return found


def content_digest(path: Path) -> str:
    """Return the sha256 of a regular file, without the cache. Raises OSError."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _digest_record(path: Path) -> Path:
    # Includes the change time, which cannot be set back, unlike the modification time.
    stat = path.stat()
    times = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return cache_root() / "digests" / digest(str(path.resolve()), times)
