"""Safetensors files: headers, checksummed writing, and joining files with little memory.

A file consists of an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, and the data. This module adds what the ``safetensors`` package does not offer.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xxhash import xxh3_64

from hisvd_cli.utils.errors import OutputError, SourceError, reason
from hisvd_cli.utils.files.atomic import replacing
from hisvd_cli.utils.files.cache import write_hint
from hisvd_cli.utils.files.checksums import BLANK, KEY, PLACE, remember
from hisvd_cli.utils.files.json_files import MAX_BYTES
from hisvd_cli.utils.files.safetensors_header import (
    DTYPE_NAMES,
    Header,
    TensorInfo,
    dtype_name,
    parse_header,
)

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "Run the same command again: it rebuilds damaged files."

_CHUNK = 1 << 20
_DAMAGED = "Download or write the file again; it is damaged or incomplete."


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        SourceError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse_header(path, file, size)
    except OSError as error:
        raise SourceError(
            f"Cannot read {path}: {reason(error)}", "Check that the file exists and is readable."
        ) from error


def _parse_header(path: Path, file: BinaryIO, size: int) -> Header:
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_BYTES
    if length > min(MAX_BYTES, size - 8):
        raise SourceError(f"{path} is not a complete safetensors file ({size} bytes).", _DAMAGED)
    try:
        header = parse_header(file.read(length), 8 + length)
    except ValueError as error:
        raise SourceError(
            f"{path} has no valid safetensors header: {reason(error)}", _DAMAGED
        ) from error
    header = Header(header.tensors, _without_checksum(header.metadata))
    end = max((info.end for info in header.tensors.values()), default=8 + length)
    if end != size:
        raise SourceError(f"{path} has {size} bytes, but its header describes {end}.", _DAMAGED)
    return header


def read_tensors(
    path: Path, hint: str, wanted: Callable[[str], bool] = bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        path: the file.
        hint: hint of the error if it is missing or damaged.
        wanted: returns whether the tensor of a name is read; by default all are.

    Raises:
        SourceError: the file is missing, truncated, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
            return found, _without_checksum(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SourceError(f"Cannot read {path}: {reason(error)}", hint) from error


def _without_checksum(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != KEY}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        OutputError: the file cannot be written, for example on a full disk.
    """
    # Wide elements first, as in safetensors, so that each tensor is aligned to its element size.
    named = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    infos = [
        (name, TensorInfo(dtype_name(t.dtype), tuple(t.shape), 0, t.numel() * t.element_size()))
        for name, t in named
    ]
    _write(path, infos, (_bytes(tensor) for _, tensor in named), metadata)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def _write(
    path: Path,
    tensors: Sequence[tuple[str, TensorInfo]],
    data: Iterable[bytes | memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with its checksum. Raises OutputError."""
    header = _header(tensors, {KEY: BLANK, **metadata})
    state = xxh3_64(header)
    with replacing(path) as temporary, temporary.open("wb") as target:
        target.write(header)
        for chunk in data:
            state.update(chunk)
            target.write(chunk)
        target.seek(PLACE)
        target.write(state.hexdigest().encode())
    remember(path)


@contextmanager
def serializing(path: Path) -> Iterator[None]:
    """Convert write errors of torch and safetensors in the body, such as on a full disk.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OutputError(f"Cannot write {path}: {reason(error)}", write_hint(path)) from error
    except RuntimeError as error:
        # On a full disk, torch's archive writer only reports an unexpected byte count.
        if not any(name in str(error) for name in ("inline_container", "PytorchStreamWriter")):
            raise
        system = error.__context__
        why = reason(system) if isinstance(system, OSError) else "incomplete write."
        raise OutputError(f"Cannot write {path}: {why}", write_hint(path, system)) from error


def join_files(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """Join the tensors of all ``parts`` into one safetensors file.

    Bytes are copied in chunks, so that memory use does not grow with the size of the files.

    Raises:
        OutputError: the file cannot be written.
        SourceError: a part is damaged.
    """
    placed = [(part, *item) for part in parts for item in read_header(part).tensors.items()]
    # Wide elements first, as in safetensors, so that each tensor is aligned to its element size.
    placed.sort(key=lambda item: item[2].width, reverse=True)
    data = (chunk for part, _, info in placed for chunk in _chunks(part, info))
    _write(path, [(name, info) for _, name, info in placed], data, metadata)


def write_parts(
    path: Path,
    name: str,
    parts: Sequence[Tensor],
    metadata: Mapping[str, str],
    written: Callable[[], None],
) -> None:
    """Write a safetensors file with one tensor, some rows at a time.

    Args:
        path: the file.
        name: name of the tensor.
        parts: the rows, in order, of one dtype.
        metadata: metadata of the file.
        written: called after each part.

    Raises:
        OutputError: the file cannot be written.
    """
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    size = math.prod(shape) * parts[0].element_size()

    def data() -> Iterator[memoryview]:
        for part in parts:
            yield _bytes(part)
            written()

    _write(path, [(name, TensorInfo(dtype_name(parts[0].dtype), shape, 0, size))], data(), metadata)


def _header(tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and the JSON header for consecutive tensors."""
    names = {torch_name: name for name, torch_name in DTYPE_NAMES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, info in tensors:
        entries[name] = {
            "dtype": names.get(info.dtype, info.dtype),
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires 8-byte alignment
    return struct.pack("<Q", len(text)) + text


def _chunks(part: Path, info: TensorInfo) -> Iterator[bytes]:
    with part.open("rb") as source:
        source.seek(info.start)
        left = info.nbytes
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise SourceError(f"{part} was truncated while it was read.", _DAMAGED)
            left -= len(data)
            yield data
