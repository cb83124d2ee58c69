"""Text by name ─► tokens: named sets, hub ids, local files; seeded and hashed.

Perplexity and calibration read a text in the same way: the split's documents are joined by blank
lines, tokenized once with the tokenizer's own special tokens, and cut into windows that do not
overlap. No window gets a BOS of its own; the text gets one where the tokenizer adds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hisvd_cli.calibration.chats import is_chat, messages_of, rendered
from hisvd_cli.calibration.token_ids import known_ids
from hisvd_cli.modeling.sources.companions import companions
from hisvd_cli.modeling.sources.source import DEMO, DEMO_FOLDER
from hisvd_cli.utils.errors import DataError, suggest
from hisvd_cli.utils.files.fingerprints import digest, expanded, file_digest
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.files.tensorfile import reason
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.modeling.sources.source import Source

Purpose = Literal["calibration", "evaluation"]
_JOIN = "\n\n"
_FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
_PACKED = ".gz"
FILE = "file"
"""The split of a text that is a file."""
INSTRUCTION = "instruction"
"""The field by which a set of instructions is known."""
_TEXT_COLUMNS = ("text", "sentence", "content", "document")
_PARQUET_ROWS = 64
"""Rows that are unpacked at a time."""
_UNPACKED_BASE, _UNPACKED_RATIO = 1 << 26, 100
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
    """A text and where it came from; ``digest`` is the sha256 of its content.

    Attributes:
        name: as the user gave it.
        split: of the set.
        content: the text; of conversations, their rows as JSON.
        chats: the conversations, of which a model's chat template makes the text.
    """

    name: str
    split: str
    content: str
    chats: tuple[list[dict[str, Any]], ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the content."""
        return digest(self.content)


def without(text: Text, dropped: str) -> Text:
    """Return a text that lacks some characters wherever they stand, with a space before them."""
    if not dropped:
        return text
    if text.chats:
        shorter = [[_without(message, dropped) for message in chat] for chat in text.chats]
        return _of_chats(text.name, text.split, shorter)
    return replace(text, content=_cut(text.content, dropped))


def _cut(content: str, dropped: str) -> str:
    return content.replace(f" {dropped}", "").replace(dropped, "")


def _without(message: dict[str, Any], dropped: str) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": _cut(content, dropped)} if isinstance(content, str) else message


def _of_chats(name: str, split: str, chats: Iterable[list[dict[str, Any]]]) -> Text:
    rows = tuple(chats)
    content = "\n".join(json.dumps(chat, ensure_ascii=False, sort_keys=True) for chat in rows)
    return Text(name, split, content, rows)


def load_text(name: str, purpose: Purpose) -> Text:
    """Load a text: an existing file wins, then the named sets, then a hub id.

    Args:
        name: path of a .txt, .jsonl, .json or .parquet file, text perhaps packed as .gz; wikitext2,
            c4, ptb or demo; or a hub id, with ``:configuration`` behind it where the set has
            several. Rows hold a text, or a conversation for the model's chat template.
        purpose: decides the split: train for calibration, test for evaluation.

    Raises:
        DataError: nothing by that name, it cannot be fetched, or it holds no text.
    """
    path = expanded(name)
    if path.is_file():
        text = _read_file(name, path)
    elif name == DEMO:
        content = (DEMO_FOLDER / f"{purpose}.txt").read_text(encoding="utf-8")
        text = Text(name, purpose, content)
    elif _kind(path) in _FILE_KINDS or _is_folder(name) or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no file '{name}'{', only a folder' if _is_folder(name) else ''}.",
            f"Give the path of a {', '.join(_FILE_KINDS)} file, text also as {_PACKED}.",
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
        elif _kind(path) in {".json", ".jsonl"}:
            rows = _json_rows(path, _read_plain(path))
        else:
            return None
    elif name in NAMED or "/" not in name or _kind(path) in _FILE_KINDS or _is_folder(name):
        return None  # a text, or nothing: load_text tells
    else:
        rows = _hub_rows(name, _custom(name), "calibration")
    first = next(rows, None)
    if not isinstance(first, dict) or INSTRUCTION not in first:
        return None
    return [first, *(row if isinstance(row, dict) else {} for row in rows)]


def _is_folder(name: str) -> bool:
    """Tell whether ``datasets`` would read a folder that lies here in the place of a hub id."""
    return expanded(name).is_dir() or Path(_custom(name).repo).is_dir()


def _custom(name: str) -> HubSet:
    repo, _, config = name.partition(":")
    return HubSet(repo, _TRAIN_AND_TEST, config=config or None)


def _kind(path: Path) -> str:
    """Return the ending of a file's name, of a packed one that of its content."""
    return (path.with_suffix("") if path.suffix == _PACKED else path).suffix


def _read_file(name: str, path: Path) -> Text:
    """Read a file of text, or of rows. Read here, not by ``datasets``, whose cache keeps copies."""
    try:
        if path.suffix == ".parquet":
            return _of_rows(name, FILE, _parquet_rows(path))
        content = _read_plain(path)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error
    if _kind(path) in {".json", ".jsonl"}:
        return _of_rows(name, FILE, _json_rows(path, content))
    return Text(name, FILE, content)


def _read_plain(path: Path) -> str:
    try:
        data = _unpacked(path) if path.suffix == _PACKED else path.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text.", "Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error


def _unpacked(path: Path) -> bytes:
    """Return the content of a gzip file. Raises DataError, OSError."""
    import gzip
    import zlib

    limit = _UNPACKED_BASE + _UNPACKED_RATIO * path.stat().st_size
    try:
        with gzip.open(path) as file:
            data = file.read(limit + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is no readable gzip file: {reason(error)}", "Write or fetch it again."
        ) from error
    if len(data) > limit:
        raise DataError(
            f"{path} unpacks to more than {limit:,} bytes.", "Unpack it, and give the result."
        )
    return data


def _parquet_rows(path: Path) -> Iterator[object]:
    # pyarrow comes with datasets, which is made on top of it.
    from pyarrow import RecordBatch, parquet  # type: ignore[import-untyped]

    def unreadable(why: str) -> DataError:
        return DataError(f"{path} is no readable parquet file: {why}", "Write or fetch it again.")

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


def _json_rows(path: Path, content: str) -> Iterator[object]:
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
            f"{path} is no JSON in line {line}: {why}.",
            "It must hold an object per line, or one list of objects.",
        ) from error


def _load_hub(name: str, hub: HubSet, purpose: Purpose) -> Text:
    return _of_rows(name, hub.splits[purpose], _hub_rows(name, hub, purpose))


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


def _of_rows(name: str, split: str, rows: Iterator[object]) -> Text:
    """Return the text of rows, or their conversations; the first row says which."""
    first = next(rows, None)
    known = first if isinstance(first, dict) else {}
    given = rows if first is None else chain([first], rows)
    if is_chat(known) and not any(column in known for column in _TEXT_COLUMNS):
        numbered = enumerate((row if isinstance(row, dict) else {} for row in given), 1)
        return _of_chats(name, split, (messages_of(row, name, i) for i, row in numbered))
    return Text(name, split, _join_rows(given, name))


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
                f"Name the column one of: {', '.join(_TEXT_COLUMNS)}; or give conversations as "
                "messages.",
            )
        if (text := known.get(column)) is not None:
            texts.append(str(text))
    return _JOIN.join(texts)


def tokenize(text: Text, source: Source) -> Tensor:
    """Return the token ids ``[T]`` of a whole text, tokenized as one sequence; do not edit them.

    Raises:
        DataError: the model has no embedding for one.
    """
    return known_ids(_encoded(text, source, False)[0], source)


_Encoded: TypeAlias = "tuple[Tensor, Tensor | None]"
_RECENT: dict[tuple[object, ...], _Encoded] = {}
_MOST_RECENT = 4


def _encoded(text: Text, source: Source, places: bool) -> _Encoded:
    """Tokenize a text, unless a model with the same tokenizer did so just now, as one does before
    and after a compression; also return where each token ends, if asked."""
    files = [(path.name, file_digest(path)) for path in companions(source.folder)]
    home = "" if files and not source.runs_code else str(source.folder)
    key = (text.digest, bool(text.chats), places, home, *files)
    if key not in _RECENT:
        made = _encode(text, source, places)
        while len(_RECENT) >= _MOST_RECENT:
            del _RECENT[next(iter(_RECENT))]
        _RECENT[key] = made
    return _RECENT[key]


def _encode(text: Text, source: Source, places: bool) -> _Encoded:
    import torch

    content, more = _tokenized_as(text, source)
    if not places:  # longer than the model's window: that is meant, not a mistake
        ids = source.tokenizer(content, verbose=False, **more)["input_ids"]
        return torch.tensor(ids, dtype=torch.long), None
    encoded = source.tokenizer(content, verbose=False, return_offsets_mapping=True, **more)
    data = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
    # Bytes of the form 10xxxxxx go on with a character that began before them.
    starts = ((data & 0xC0) != 0x80).nonzero().flatten()
    stops = torch.cat([starts, torch.tensor([len(data)])])  # of each character, and of the end
    ends = stops[torch.tensor([end for _, end in encoded["offset_mapping"]])]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), ends.cummax(0).values


def _tokenized_as(text: Text, source: Source) -> tuple[str, dict[str, Any]]:
    """Return what a model's tokenizer is given, and how. A chat template writes special tokens
    itself. Raises DataError."""
    if not text.chats:
        return text.content, {}
    return rendered(text.chats, text.name, source), {"add_special_tokens": False}


def token_ends(text: Text, source: Source) -> tuple[Tensor, Tensor | None]:
    """Return the token ids ``[T]`` of a whole text, and where in it each ends ``[T]``.

    Ends are counted in UTF-8 bytes from the start of the text, and never fall: a character that
    several tokens share ends with the first of them, what a tokenizer skips belongs to the token
    behind it, and a token that stands for no text ends where the one before it does. So the
    difference of two ends is exactly the bytes of the text between them.

    Ends are None for a tokenizer that cannot say where its tokens stand (one without a fast form).

    Raises:
        DataError: the model has no embedding for a token.
    """
    ids, ends = _encoded(text, source, source.tokenizer.is_fast)
    return known_ids(ids, source), ends


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
