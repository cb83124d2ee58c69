"""Text by name: named datasets, hub ids and local files, hashed.

Perplexity and calibration read a text in the same way: the split's documents are joined by blank
lines, then tokenized by :mod:`hisvd_cli.calibration.text.tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from hisvd_cli.calibration.text.chats import is_chat, messages_of
from hisvd_cli.calibration.text.files import (
    FILE_KINDS,
    PACKED,
    json_rows,
    kind_of_file,
    parquet_rows,
    read_plain,
)
from hisvd_cli.modeling.sources.source import DEMO, DEMO_FOLDER
from hisvd_cli.utils.errors import DataError, reason, suggest
from hisvd_cli.utils.files.fingerprints import digest, expanded

Purpose = Literal["calibration", "evaluation"]
_JOIN = "\n\n"
FILE = "file"
"""The split of a text that is a file."""
INSTRUCTION = "instruction"
"""The field by which a set of instructions is known."""
_TEXT_COLUMNS = ("text", "sentence", "content", "document")


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
        name: path of a .txt, .jsonl, .json or .parquet file, text also compressed; wikitext2,
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
    elif kind_of_file(path) in FILE_KINDS or _is_folder(name) or name.startswith((".", "/", "~")):
        raise DataError(
            f"There is no file '{name}'{', only a folder' if _is_folder(name) else ''}.",
            f"Give the path of a {', '.join(FILE_KINDS)} file; text may be compressed "
            f"({', '.join(PACKED)}).",
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
            rows = parquet_rows(path)
        elif kind_of_file(path) in {".json", ".jsonl"}:
            rows = json_rows(path, read_plain(path))
        else:
            return None
    elif name in NAMED or "/" not in name or kind_of_file(path) in FILE_KINDS or _is_folder(name):
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


def _read_file(name: str, path: Path) -> Text:
    """Read a file of text, or of rows. Read here, not by ``datasets``, whose cache keeps copies."""
    try:
        if path.suffix == ".parquet":
            return _of_rows(name, FILE, parquet_rows(path))
        content = read_plain(path)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", "Check that the file is there and readable."
        ) from error
    if kind_of_file(path) in {".json", ".jsonl"}:
        return _of_rows(name, FILE, json_rows(path, content))
    return Text(name, FILE, content)


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
