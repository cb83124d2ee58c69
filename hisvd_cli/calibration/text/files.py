"""Files of text or rows ─► their content: plain, compressed, JSON lines and Parquet."""

from __future__ import annotations

import bz2
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from hisvd_cli.utils.errors import DataError, reason
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.library_errors import library_errors

FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKED = (".gz", ".bz2", ".zst")
_PARQUET_ROWS = 64
"""Rows that are unpacked at a time."""
_UNPACKED_BASE, _UNPACKED_RATIO = 1 << 26, 100
"""Bytes that a parquet file may unpack to: so many, and so many times its size."""


def kind_of_file(path: Path) -> str:
    """Return the ending of a file's name, of a packed one that of its content."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def read_plain(path: Path) -> str:
    try:
        data = _unpacked(path) if path.suffix in PACKED else path.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text.", "Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error


def _unpacked(path: Path) -> bytes:
    """Return the content of a compressed file. Raises DataError, OSError."""
    limit = _UNPACKED_BASE + _UNPACKED_RATIO * path.stat().st_size
    with path.open("rb") as packed:
        try:
            with _decompressor(path.suffix, packed) as file:
                data = file.read(limit + 1)
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise DataError(
                f"{path} is not a readable {path.suffix} file: {reason(error)}",
                "Write or download it again.",
            ) from error
    if len(data) > limit:
        raise DataError(
            f"{path} unpacks to more than {limit:,} bytes.", "Unpack it, and give the result."
        )
    return data


def _decompressor(suffix: str, packed: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    if suffix == ".gz":
        return gzip.open(packed)
    if suffix == ".bz2":
        return bz2.open(packed)
    import pyarrow

    stream: AbstractContextManager[IO[bytes]] = pyarrow.CompressedInputStream(packed, "zstd")
    return stream


def parquet_rows(path: Path) -> Iterator[object]:
    # pyarrow comes with datasets, which is made on top of it.
    from pyarrow import RecordBatch, parquet  # type: ignore[import-untyped]

    def unreadable(why: str) -> DataError:
        return DataError(
            f"{path} is not a readable parquet file: {why}", "Write or fetch it again."
        )

    limit = _UNPACKED_BASE + _UNPACKED_RATIO * path.stat().st_size
    with library_errors(unreadable), parquet.ParquetFile(path) as file:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > limit:
            raise unreadable(f"it declares more than {limit:,} bytes of data.")
        read = 0
        for batch in file.iter_batches(_PARQUET_ROWS):
            # An entry of a dictionary would otherwise count once, and be unpacked many times.
            columns = [c.dictionary_decode() if _is_coded(c) else c for c in batch.columns]
            plain = RecordBatch.from_arrays(columns, names=batch.schema.names)
            read += plain.nbytes
            if read > limit:
                raise unreadable(f"it unpacks to more than {limit:,} bytes.")
            yield from plain.to_pylist()


def _is_coded(column: Any) -> bool:
    return hasattr(column, "dictionary_decode")


def json_rows(path: Path, content: str) -> Iterator[object]:
    """Yield the objects of JSON lines, or of one list, whatever the file's name says."""
    if content.lstrip().startswith("["):
        yield from _parse(path, content, 1)
        return
    first = content.lstrip().partition("\n")[0].strip()
    if first == "{":  # one object over several lines: its rows are its only list, or itself
        whole = _parse(path, content, 1)
        lists = [value for value in whole.values() if isinstance(value, list)]
        yield from lists[0] if len(lists) == 1 and lists[0] else [whole]
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _parse(path, line, number)


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return parse_json(text, strict=False)
    except ValueError as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, why = line + error.lineno - 1, error.msg
        raise DataError(
            f"{path} is not JSON in line {line}: {why}.",
            "It must hold an object per line, or one list of objects.",
        ) from error
