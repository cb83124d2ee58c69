"""Text by name ─► tokens: named sets, hub ids, local files; seeded and hashed.

Perplexity and calibration read a text in the same way: the split's documents are joined by blank
lines, tokenized once with the tokenizer's own special tokens, and cut into windows that do not
overlap. No window gets a BOS of its own; the text gets one where the tokenizer adds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hisvd_cli.errors import DataError, suggest
from hisvd_cli.json_files import parse_json
from hisvd_cli.library_errors import library_errors
from hisvd_cli.paths import digest, expanded
from hisvd_cli.source import DEMO, DEMO_FOLDER
from hisvd_cli.tensorfile import reason

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.source import Source

Purpose = Literal["calibration", "evaluation"]
_JOIN = "\n\n"
_FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
INSTRUCTION = "instruction"
"""The field by which a set of instructions is known."""
_TEXT_COLUMNS = ("text", "sentence", "content", "document")
_PARQUET_ROWS = 64
"""Rows that are unpacked at a time."""
_PARQUET_BASE, _PARQUET_RATIO = 1 << 26, 100
"""Bytes that a parquet file may unpack to: so many, and so many times its size."""


@dataclass(frozen=True)
class HubSet:
    """A set on the hub.

    Attributes:
        repo: its id.
        splits: the split of each purpose.
        config: its configuration, where it has several.
        revision: branch, tag or commit.
        files: the file of each purpose, where not the whole set is wanted or described.
        limit: read only the first so many documents, as a stream.
    """

    repo: str
    splits: dict[Purpose, str]
    config: str | None = None
    revision: str | None = None
    files: dict[Purpose, str] | None = None
    limit: int | None = None


_TRAIN_AND_TEST: dict[Purpose, str] = {"calibration": "train", "evaluation": "test"}
NAMED = {
    "wikitext2": HubSet("Salesforce/wikitext", _TRAIN_AND_TEST, config="wikitext-2-raw-v1"),
    "c4": HubSet(
        "allenai/c4",
        {"calibration": "train", "evaluation": "validation"},
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        limit=20_000,
    ),
    # The set itself is a script, which datasets no longer runs; the hub's own conversion of it
    # lies on a branch.
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only",
        _TRAIN_AND_TEST,
        revision="refs/convert/parquet",
        files={
            "calibration": "penn_treebank/train/*.parquet",
            "evaluation": "penn_treebank/test/*.parquet",
        },
    ),
}


@dataclass(frozen=True)
class Text:
    """A text and where it came from; ``digest`` is the sha256 of its content."""

    name: str
    split: str
    content: str

    @property
    def digest(self) -> str:
        """sha256 of the content."""
        return digest(self.content)


def without(text: Text, dropped: str) -> Text:
    """Return a text that lacks some characters wherever they stand, with a space before them."""
    if not dropped:
        return text
    return replace(text, content=text.content.replace(f" {dropped}", "").replace(dropped, ""))


def load_text(name: str, purpose: Purpose) -> Text:
    """Load a text: an existing file wins, then the named sets, then a hub id.

    Args:
        name: path of a .txt, .jsonl, .json or .parquet file; wikitext2, c4, ptb or demo; or a hub
            id, with ``:configuration`` behind it where the set has several.
        purpose: decides the split: train for calibration, test for evaluation.

    Raises:
        DataError: nothing by that name, it cannot be fetched, or it holds no text.
    """
    path = expanded(name)
    if path.is_file():
        text = Text(name, "file", _read_file(path))
    elif name == DEMO:
        content = (DEMO_FOLDER / f"{purpose}.txt").read_text(encoding="utf-8")
        text = Text(name, purpose, content)
    elif path.suffix in _FILE_KINDS or path.is_dir() or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no file '{name}'{', only a folder' if path.is_dir() else ''}.",
            f"Give the path of a {', '.join(_FILE_KINDS)} file.",
        )
    elif name in NAMED or "/" in name:
        text = _load_hub(name, NAMED.get(name) or _custom(name), purpose)
    else:
        raise DataError(
            f"No dataset '{name}': no such file, named set or hub id.",
            suggest(name, [*NAMED, DEMO]),
        )
    if not text.content.strip():
        raise DataError(f"'{name}' holds no text.", "Give a file or set with text in it.")
    return text


def load_instructions(name: str) -> list[dict[str, Any]] | None:
    """Return the rows of a set of instructions, or None where a name stands for plain text.

    A set holds instructions where its first row has a field of that name.

    Args:
        name: as in :func:`load_text`.

    Raises:
        DataError: a file or set cannot be read.
    """
    path = expanded(name)
    rows: Iterator[object]
    if path.is_file():
        if path.suffix == ".parquet":
            rows = _parquet_rows(path)
        elif path.suffix in {".json", ".jsonl"}:
            rows = _json_rows(path, _read_plain(path))
        else:
            return None
    elif name in NAMED or "/" not in name or path.suffix in _FILE_KINDS or path.is_dir():
        return None  # a text, or nothing: load_text tells
    else:
        rows = _hub_rows(name, _custom(name), "calibration")
    first = next(rows, None)
    if not isinstance(first, dict) or INSTRUCTION not in first:
        return None
    return [first, *(row if isinstance(row, dict) else {} for row in rows)]


def _custom(name: str) -> HubSet:
    repo, _, config = name.partition(":")
    return HubSet(repo, _TRAIN_AND_TEST, config=config or None)


def _read_file(path: Path) -> str:
    """Read a file of text, or of rows. Read here, not by ``datasets``, whose cache keeps copies."""
    try:
        if path.suffix == ".parquet":
            return _join_rows(_parquet_rows(path), str(path))
        content = _read_plain(path)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error
    if path.suffix in {".json", ".jsonl"}:
        return _join_rows(_json_rows(path, content), str(path))
    return content


def _read_plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text.", "Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error


def _parquet_rows(path: Path) -> Iterator[object]:
    # pyarrow comes with datasets, which is made on top of it.
    from pyarrow import RecordBatch, parquet  # type: ignore[import-untyped]

    def unreadable(why: str) -> DataError:
        return DataError(f"{path} is no readable parquet file: {why}", "Write or fetch it again.")

    limit = _PARQUET_BASE + _PARQUET_RATIO * path.stat().st_size
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


def _json_rows(path: Path, content: str) -> Iterator[object]:
    """Yield the objects of JSON lines, or of one list."""
    if path.suffix == ".json" and content.lstrip().startswith("["):
        yield from _parse(path, content, 1)
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
            f"{path} is no JSON in line {line}: {why}.",
            "A .jsonl file holds an object per line, a .json file also a list of objects.",
        ) from error


def _load_hub(name: str, hub: HubSet, purpose: Purpose) -> Text:
    return Text(name, hub.splits[purpose], _join_rows(_hub_rows(name, hub, purpose), name))


def _hub_rows(name: str, hub: HubSet, purpose: Purpose) -> Iterator[object]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    split = hub.splits[purpose]
    try:
        rows = datasets.load_dataset(
            hub.repo,
            hub.config,
            split=split,
            revision=hub.revision,
            data_files={split: hub.files[purpose]} if hub.files else None,
            streaming=hub.limit is not None,
        )
        yield from islice(rows, hub.limit)
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(
            f"Cannot fetch '{name}' ({hub.repo}, split {split}) from the hub: {reason(error)}",
            "Check name and network, or give a local .txt, .jsonl or .parquet file instead.",
        ) from error


def _join_rows(rows: Iterable[object], name: str) -> str:
    """Join the texts of rows; the first row says which column holds them, and empty ones count."""
    texts: list[str] = []
    column = None
    for row in rows:
        known = row if isinstance(row, dict) else {}
        column = column or next((c for c in _TEXT_COLUMNS if c in known), None)
        if column is None:
            raise DataError(
                f"'{name}' has no text column; it has {', '.join(map(str, known)) or 'none'}.",
                f"Name the column one of: {', '.join(_TEXT_COLUMNS)}.",
            )
        if (text := known.get(column)) is not None:
            texts.append(str(text))
    return _JOIN.join(texts)


def tokenize(text: Text, source: Source) -> Tensor:
    """Return the token ids ``[T]`` of a whole text, tokenized once."""
    import torch

    # The whole text is one sequence, longer than the model's window: that is meant, not a mistake.
    ids = source.tokenizer(text.content, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def token_ends(text: Text, source: Source) -> tuple[Tensor, Tensor | None]:
    """Return the token ids ``[T]`` of a whole text, and where in it each ends ``[T]``.

    Ends are counted in UTF-8 bytes from the start of the text, and never fall: a character that
    several tokens share ends with the first of them, what a tokenizer skips belongs to the token
    behind it, and a token that stands for no text ends where the one before it does. So the
    difference of two ends is exactly the bytes of the text between them.

    Ends are None for a tokenizer that cannot say where its tokens stand (one without a fast form).
    """
    import torch

    if not source.tokenizer.is_fast:
        return tokenize(text, source), None
    encoded = source.tokenizer(text.content, verbose=False, return_offsets_mapping=True)
    data = torch.frombuffer(bytearray(text.content.encode()), dtype=torch.uint8)
    # Bytes of the form 10xxxxxx go on with a character that began before them.
    starts = ((data & 0xC0) != 0x80).nonzero().flatten()
    places = torch.cat([starts, torch.tensor([len(data)])])  # of each character, and of the end
    ends = places[torch.tensor([end for _, end in encoded["offset_mapping"]])]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), ends.cummax(0).values


def sample_windows(tokens: Tensor, samples: int, seqlen: int, seed: int, name: str) -> Tensor:
    """Draw windows ``[S, L]`` without overlap; S is less than ``samples`` where the text is short.

    The draw depends on the tokens, the two sizes and the seed only.

    Raises:
        DataError: not even one window.
    """
    import torch

    available = len(tokens) // seqlen
    if available == 0:
        raise DataError(
            f"'{name}' holds {len(tokens):,} tokens, too few for one window of {seqlen}.",
            f"Lower --seqlen to {len(tokens)} or less, or give a longer text."
            if len(tokens) > 1
            else "Give a longer text.",
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples]
    return tokens[: available * seqlen].view(available, seqlen)[chosen]


def model_positions(source: Source) -> int | None:
    """Return the longest sequence that the model has positions for, where its config says."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_seqlen(seqlen: int, source: Source) -> None:
    """Raise DataError where ``seqlen`` is longer than the model's positions."""
    limit = model_positions(source)
    if limit is not None and seqlen > limit:
        raise DataError(
            f"--seqlen {seqlen} is longer than the {limit} positions of {source.name}.",
            f"Use --seqlen {limit} or less.",
        )
