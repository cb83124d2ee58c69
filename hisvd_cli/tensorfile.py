"""The safetensors file format: headers without tensors, and files joined without memory.

A file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, and the tensors' bytes. Only what the ``safetensors`` package does not offer is
here; tensors themselves are read and written by it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from xxhash import xxh3_64

from hisvd_cli.checksums import BLANK, KEY, PLACE, remember
from hisvd_cli.errors import OutputError, SourceError

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' name of a dtype → torch's."""

SPACE_HINT = "Free some space or choose another folder; a rerun goes on after the last block."
AGAIN = "Run the same command again: it makes anew what is damaged."
TEMPORARY = ".*.tmp"
"""Matches what a killed run may leave of a file that it was writing."""

_MAX_HEADER = 100_000_000
_CHUNK = 1 << 20
_DAMAGED = "Fetch or write the file again; it is damaged or was not written to its end."


def reason(error: BaseException) -> str:
    """Return in one line what an error of the operating system or of a library says."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    line = str(text).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?", ":")) else f"{line}."


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; ``start`` and ``end`` are absolute byte positions."""

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
        """Bytes of one element; infinite where there is none."""
        count = math.prod(self.shape)
        return self.nbytes / count if count else math.inf


@dataclass(frozen=True)
class Header:
    """The tensors of a file in file order, and its string metadata but for the checksum."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


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
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER
    if length > min(_MAX_HEADER, size - 8):
        raise SourceError(f"{path} is no complete safetensors file ({size} bytes).", _DAMAGED)
    try:
        entries = json.loads(file.read(length))
        metadata = _without_checksum(entries.pop("__metadata__", {}))
        base = 8 + length
        tensors = {
            name: TensorInfo(
                DTYPE_NAMES.get(entry["dtype"], entry["dtype"]),
                tuple(entry["shape"]),
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(f"{path} has no valid safetensors header.", _DAMAGED) from error
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    end = max((info.end for info in ordered.values()), default=base)
    if end != size:
        raise SourceError(f"{path} holds {size} bytes where its header names {end}.", _DAMAGED)
    return Header(ordered, metadata)


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
        (name, TensorInfo(_dtype(t), tuple(t.shape), 0, t.numel() * t.element_size()))
        for name, t in named
    ]
    _write(path, infos, (_bytes(tensor) for _, tensor in named), metadata)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name once the body has succeeded.

    Raises:
        OutputError: the operating system refuses the write.
    """
    # Two processes may write the same file of a cache: each has a temporary name of its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors creates files that only the owner reads
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {reason(error)}", SPACE_HINT) from error
    finally:
        with suppress(OSError):  # a path that cannot be written may be one that cannot be looked at
            temporary.unlink()


def _umask() -> int:
    # The only portable way to read the umask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises OutputError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: object) -> None:
    """Write an indented JSON document whole or not at all. Raises OutputError."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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

    _write(path, [(name, TensorInfo(_dtype(parts[0]), shape, 0, size))], data(), metadata)


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
