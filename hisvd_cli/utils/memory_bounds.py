"""How much memory a run may take: the text of ``--max-memory`` ─► bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic_core import PydanticCustomError

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}  # powers of 1000, or with an i of 1024
_LARGEST = 1 << 62
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.IGNORECASE)
HOST = "cpu"
DEVICES = (HOST, "cuda", "mps")
_WANTED = "a size such as 3GB or 512MiB, or one for each device: cpu=8GB,cuda=20GB"


@dataclass(frozen=True)
class MemoryBounds:
    """Bytes that may be taken, at the peak.

    Attributes:
        host: of the machine's memory, resident; None is no bound.
        devices: type of a device → bytes of its own memory.
    """

    host: int | None
    devices: dict[str, int]


def parse_bounds(text: str) -> MemoryBounds:
    """Read ``3GB`` (the host's), or ``cpu=8GB,cuda=20GB``; GB are 10⁹ bytes, GiB 2³⁰.

    Raises:
        ValueError: something else.
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
    """Return a text that :func:`parse_bounds` reads. Raises PydanticCustomError: any other."""
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
