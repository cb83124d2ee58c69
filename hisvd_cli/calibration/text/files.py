"""Reads files of text or rows: plain, compressed, JSON, JSON lines and Parquet."""

from __future__ import annotations

import bz2
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, cast

from hisvd_cli.utils.errors import DataError, reason
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.library_errors import library_errors

FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKED = (".gz", ".bz2", ".zst")
_PARQUET_ROWS = 64
"""Rows per batch."""
_UNPACKED_BASE, _UNPACKED_RATIO = 1 << 26, 100
"""Limit on decompressed bytes: this constant plus this multiple of the file size."""


def kind_of_file(path: Path) -> str:
    """Return the suffix of a file name, without that of compression."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def read_plain(path: Path) -> str:
    """Return the text of a plain or compressed file, with newlines as ``\\n``. Raises DataError."""
    try:
        data = _unpacked(path) if path.suffix in PACKED else path.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text.", "Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file exists and is readable."
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
                "Create or download the file again.",
            ) from error
    if len(data) > limit:
        raise DataError(
            f"{path} decompresses to more than {limit:,} bytes.",
            "Decompress the file and give the result.",
        )
    return data


def _decompressor(suffix: str, packed: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    if suffix == ".gz":
        return cast(AbstractContextManager[IO[bytes]], gzip.open(packed))
    if suffix == ".bz2":
        return bz2.open(packed)
    import pyarrow  # type: ignore[import-untyped]

    stream: AbstractContextManager[IO[bytes]] = pyarrow.CompressedInputStream(packed, "zstd")
    return stream


def parquet_rows(path: Path) -> Iterator[object]:
    """Yield the rows of a Parquet file. Raises DataError."""
    # pyarrow is a dependency of datasets.
    from pyarrow import RecordBatch, parquet

    def unreadable(why: str) -> DataError:
        return DataError(
            f"{path} is not a readable Parquet file: {why}", "Create or download the file again."
        )

    limit = _UNPACKED_BASE + _UNPACKED_RATIO * path.stat().st_size
    with library_errors(unreadable), parquet.ParquetFile(path) as file:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > limit:
            raise unreadable(f"it declares more than {limit:,} bytes of data.")
        read = 0
        for batch in file.iter_batches(_PARQUET_ROWS):
            # A dictionary entry would be counted once, although rows may repeat it.
            columns = [c.dictionary_decode() if _is_coded(c) else c for c in batch.columns]
            plain = RecordBatch.from_arrays(columns, names=batch.schema.names)
            read += plain.nbytes
            if read > limit:
                raise unreadable(f"it decompresses to more than {limit:,} bytes.")
            yield from plain.to_pylist()


def _is_coded(column: Any) -> bool:
    return hasattr(column, "dictionary_decode")


def json_rows(path: Path, content: str) -> Iterator[object]:
    """Yield the objects of JSON lines or of one JSON list, whatever the suffix of the file."""
    if content.lstrip().startswith("["):
        yield from _parse(path, content, 1)
        return
    first = content.lstrip().partition("\n")[0].strip()
    if first == "{":  # one object over several lines: its only list holds the rows, or it is a row
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
            f"{path} is not valid JSON in line {line}: {why}.",
            "The file must contain one object per line, or one list of objects.",
        ) from error
