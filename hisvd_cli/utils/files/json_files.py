"""JSON from files that anybody may have written: read up to a bound, parsed strictly.

The standard library accepts NaN, halves of surrogate pairs and numbers of any size, and raises
``RecursionError`` where values are nested too deep. Here all of that is a ``ValueError``.
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
"""Largest JSON document that is read; the header of a safetensors file has the same bound."""
_MAX_DEPTH = 100
_MAX_INTEGER = 1 << 63
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bounded(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or holds more than ``limit`` bytes.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it holds more than {limit:,} bytes")
        return file.read(size)  # as much memory as is asked for is taken, whatever there is


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
        strict: reject numbers that are not finite, or that are whole and need more than 64 bits.

    Raises:
        ValueError: not valid JSON, nested too deep, a number of too many digits, or half of a
            surrogate pair, which no file can hold.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    numbers: dict[str, Any] = {
        "parse_constant": _refused,
        "parse_float": _finite,
        "parse_int": _integer,
    }
    try:
        document = json.loads(text, **(numbers if strict else {}))
        check_depth(document)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair") from error
    return document


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _integer(text: str) -> int:
    number = int(text)
    if not -_MAX_INTEGER <= number < _MAX_INTEGER:
        raise ValueError("a whole number needs more than 64 bits")
    return number


def check_depth(document: object) -> None:
    """Raise ValueError where objects and lists are nested too deep: what reads a document may call
    itself once a level."""
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
    """Write an indented JSON document whole or not at all. Raises OutputError."""
    write_text(path, json_text(document))


def json_text(document: object) -> str:
    """Return a document as indented JSON."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
