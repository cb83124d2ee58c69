"""Quantities as text: memory limits (``3GB``, or ``cpu=8GB,cuda=20GB``), sizes and counts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic_core import PydanticCustomError

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}  # powers of 1000; of 1024 with an i, as in GiB
_LARGEST = 1 << 62
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.IGNORECASE)
HOST = "cpu"
DEVICES = (HOST, "cuda", "mps")
_WANTED = "a size such as 3GB or 512MiB, or one per device: cpu=8GB,cuda=20GB"


@dataclass(frozen=True)
class MemoryBounds:
    """Peak memory limits in bytes.

    Attributes:
        host: resident host memory; None for no limit.
        devices: device type → bytes of device memory.
    """

    host: int | None
    devices: dict[str, int]


def parse_bounds(text: str) -> MemoryBounds:
    """Parse ``3GB`` (host memory) or ``cpu=8GB,cuda=20GB``; a GB is 10⁹ bytes, a GiB 2³⁰.

    Raises:
        ValueError: the text has another form.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.rpartition("=")
        device = name.strip().lower() if equals else HOST
        if device not in DEVICES or device in found:
            raise ValueError(text)
        found[device] = _bytes(size.strip())
    return MemoryBounds(found.pop(HOST, None), found)


def checked(text: str) -> str:
    """Return ``text`` if :func:`parse_bounds` accepts it. Raises PydanticCustomError otherwise."""
    try:
        parse_bounds(text)
    except ValueError as error:
        raise PydanticCustomError("memory_bounds", _WANTED) from error
    return text


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()]
    if not 1 <= size <= _LARGEST:
        raise ValueError(text)
    return int(size)


def size_text(count: float) -> str:
    """Return bytes with a decimal unit: 538.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:  # larger values would be rounded to 1000.0
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural if it is not 1: 1 window, 2,048 windows."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
