"""Parses and checks the header of a safetensors file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hisvd_cli.utils.files.json_files import parse_json

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Dtype name in safetensors → in torch."""
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""Dtype name in safetensors → bytes per element."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as used in settings and records, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


_MOST_DIMENSIONS = 64
"""Limit of torch."""


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor; ``start`` and ``end`` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.end - self.start

    @property
    def width(self) -> float:
        """Bytes per element; infinite for an empty tensor."""
        count = math.prod(self.shape)
        return self.nbytes / count if count else math.inf


@dataclass(frozen=True)
class Header:
    """The tensors of a file, in file order, and its string metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def parse_header(data: bytes, base: int) -> Header:
    """Parse the JSON of a header.

    Args:
        data: the JSON.
        base: offset of the tensor data in the file.

    Raises:
        ValueError: it is invalid, or tensors overlap or leave gaps.
    """
    entries = parse_json(data)
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = {name: _entry(name, entry, base) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    end = base
    for name, info in ordered.items():
        if info.start != end:
            raise ValueError(f"the data of {name} overlaps the tensor before it or leaves a gap")
        end = info.end
    return Header(ordered, metadata)


def _metadata(document: object) -> dict[str, str]:
    if not isinstance(document, dict) or not all(isinstance(v, str) for v in document.values()):
        raise ValueError("its metadata values are not strings")
    return document


def _entry(name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    """Return the parsed entry of one tensor. Raises ValueError if it is inconsistent."""
    try:
        stored, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = (*shape, start)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no dtype, shape or data offsets") from error
    if not isinstance(stored, str) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"{name} has no valid dtype, shape or data offsets")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions")
    if type(end) is not int or end < start:
        raise ValueError(f"{name} ends before it starts")
    width = _WIDTHS.get(stored)
    if width is not None and end - start != math.prod(shape) * width:
        raise ValueError(f"{name} has {end - start} bytes, which does not match {stored} {shape}")
    return TensorInfo(DTYPE_NAMES.get(stored, stored), tuple(shape), base + start, base + end)
