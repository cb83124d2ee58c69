"""The safetensors file format: headers without tensors, and files joined without memory.

A file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, and the tensors' bytes. Only what the ``safetensors`` package does not offer is
here; tensors themselves are read and written by it.
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

AGAIN = "Run the same command again: it makes anew what is damaged."

_CHUNK = 1 << 20
_DAMAGED = "Fetch or write the file again; it is damaged or was not written to its end."


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        SourceError: the file is missing, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse_header(path, file, size)
    except OSError as error:
        raise SourceError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error


def _parse_header(path: Path, file: BinaryIO, size: int) -> Header:
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_BYTES
    if length > min(MAX_BYTES, size - 8):
        raise SourceError(f"{path} is not a complete safetensors file ({size} bytes).", _DAMAGED)
    try:
        header = parse_header(file.read(length), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{path} has no valid safetensors header: {reason(error)}", _DAMAGED
        ) from error
    header = Header(header.tensors, _without_checksum(header.metadata))
    end = max((info.end for info in header.tensors.values()), default=8 + length)
    if end != size:
        raise SourceError(f"{path} holds {size} bytes where its header names {end}.", _DAMAGED)
    return header


def read_tensors(
    path: Path, hint: str, wanted: Callable[[str], bool] = bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Args:
        path: the file.
        hint: what to do where it is missing or damaged.
        wanted: tells by its name whether a tensor is read; by default all are.

    Raises:
        SourceError: the file is missing, truncated, or no safetensors file.
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
    """Write a safetensors file: complete under its name, or not at all.

    Raises:
        OutputError: the file cannot be written, for example on a full disk.
    """
    # Wide elements first, as safetensors itself does it: so each starts at a multiple of its size.
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
    """Have what torch and safetensors raise in the body where the disk is full say so.

    Raises:
        OutputError: the operating system refuses the write.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OutputError(f"Cannot write {path}: {reason(error)}", write_hint(path)) from error
    except RuntimeError as error:
        # torch's writer of archives finds its own count of bytes wrong, and says only that.
        if not any(name in str(error) for name in ("inline_container", "PytorchStreamWriter")):
            raise
        system = error.__context__
        why = reason(system) if isinstance(system, OSError) else "not all bytes were taken."
        raise OutputError(f"Cannot write {path}: {why}", write_hint(path)) from error


def join_files(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file that holds the tensors of all ``parts``, byte for byte.

    The bytes are copied from file to file, so memory does not grow with the files' size.

    Raises:
        OutputError: the file cannot be written.
        SourceError: a part is damaged.
    """
    placed = [(part, *item) for part in parts for item in read_header(part).tensors.items()]
    # Wide elements first, as safetensors itself does it: so each starts at a multiple of its size.
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
    """Write a safetensors file of one tensor, a part of its rows at a time.

    Args:
        path: the file.
        name: of the tensor.
        parts: its rows, in order, of one dtype.
        metadata: of the file.
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
    """Return what stands before the bytes of tensors that follow each other."""
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
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text


def _chunks(part: Path, info: TensorInfo) -> Iterator[bytes]:
    with part.open("rb") as source:
        source.seek(info.start)
        left = info.nbytes
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise SourceError(f"{part} became shorter while it was read.", _DAMAGED)
            left -= len(data)
            yield data
