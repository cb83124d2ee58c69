"""Reads untrusted JSON with a size limit and strict parsing.

The standard library accepts NaN, unpaired surrogates and numbers of any size, and raises
``RecursionError`` for deeply nested values. Here, all of these raise ``ValueError``.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from hisvd_cli.utils.files.atomic import write_text

MAX_BYTES = 100_000_000
"""Size limit of JSON documents; safetensors headers have the same limit."""
_MAX_DEPTH = 100
_MAX_INTEGER = 1 << 63
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bounded(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or is larger than ``limit`` bytes.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it is larger than {limit:,} bytes")
        return file.read(size)  # exact: read() allocates the requested size in advance


def read_json(path: Path, strict: bool = True) -> Any:
    """Return the document of a JSON file.

    Args:
        path: the file.
        strict: as for :func:`parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not valid JSON (see :func:`parse_json`).
    """
    return parse_json(read_bounded(path), strict)


def parse_json(data: str | bytes, strict: bool = True) -> Any:
    """Return the document of a JSON text.

    Args:
        data: the text; bytes are UTF-8.
        strict: reject non-finite numbers and integers of more than 64 bits.

    Raises:
        ValueError: invalid JSON, nested too deeply, a number with too many digits, or an unpaired
            surrogate, which cannot be encoded.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    numbers: dict[str, Any] = {"parse_int": _any_integer}
    if strict:
        numbers = {"parse_constant": _refused, "parse_float": _finite, "parse_int": _integer}
    try:
        document = json.loads(text, **numbers)
        check_depth(document)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it contains an unpaired surrogate") from error
    return document


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _any_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # Python names a function of its own to change the limit
        raise ValueError(f"a number has {len(text):,} digits") from error


def _integer(text: str) -> int:
    number = _any_integer(text)
    if not -_MAX_INTEGER <= number < _MAX_INTEGER:
        raise ValueError("an integer needs more than 64 bits")
    return number


def check_depth(document: object) -> None:
    """Raise ValueError if objects and lists are nested too deeply for recursive readers."""
    level = [document]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else _items(outer))
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def write_json(path: Path, document: object) -> None:
    """Write a document as indented JSON, atomically. Raises OutputError."""
    write_text(path, json_text(document))


def json_text(document: object) -> str:
    """Return a document as indented JSON."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
