"""Loads text by name: named datasets, Hub ids and local files.

For calibration and evaluation alike, the documents of a split are joined by blank lines and then
tokenized by :mod:`hisvd_cli.calibration.text.tokens`.
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
"""Split name of a local file."""
INSTRUCTION = "instruction"
"""A dataset whose rows have this field is instruction data."""
_TEXT_COLUMNS = ("text", "sentence", "content", "document")


@dataclass(frozen=True)
class HubSet:
    """A dataset on the Hub.

    Attributes:
        repo: its id.
        splits: split by purpose.
        config: its configuration; None for the default.
        revision: branch, tag or commit.
        files: data file by purpose; None to use the files that the dataset declares.
        limit: stream only this many documents; None for all.
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
    # The dataset is a script, which datasets no longer supports; this branch has the Hub's
    # conversion to Parquet.
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
    """A text and its origin.

    Attributes:
        name: the name that the user gave.
        split: the split of the dataset.
        content: the text; for conversations, their rows as JSON.
        chats: the conversations, which a chat template turns into text.
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
    """Return a text with every occurrence of ``dropped`` removed, and the space before it."""
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
    """Load a text from an existing file, a named dataset or a Hub id, in this order.

    Args:
        name: path of a .txt, .jsonl, .json or .parquet file (all but Parquet also compressed);
            wikitext2, c4, ptb or demo; or a Hub id, optionally with ``:configuration``. Rows
            contain text, or conversations for the chat template of the model.
        purpose: selects the split: train for calibration, test for evaluation.

    Raises:
        DataError: the name is unknown, the download fails, or the text is empty.
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
            f"No dataset '{name}': there is no such file, named dataset or Hub id.",
            suggest(name, [*NAMED, DEMO]),
        )
    if not text.content.strip():
        raise DataError(f"'{name}' contains no text.", "Give another file or dataset.")
    return text


def load_instructions(name: str) -> list[dict[str, Any]] | None:
    """Return the rows of an instruction dataset, or None for any other text.

    A dataset is instruction data if its first row has the field ``instruction``.

    Args:
        name: as in :func:`load_text`.

    Raises:
        DataError: the file or dataset cannot be read.
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
        return None  # a text, or an error that load_text raises
    else:
        rows = _hub_rows(name, _custom(name), "calibration")
    first = next(rows, None)
    if not isinstance(first, dict) or INSTRUCTION not in first:
        return None
    return [first, *(row if isinstance(row, dict) else {} for row in rows)]


def _is_folder(name: str) -> bool:
    """Return whether ``datasets`` would read a local folder instead of a Hub id."""
    return expanded(name).is_dir() or Path(_custom(name).repo).is_dir()


def _custom(name: str) -> HubSet:
    repo, _, config = name.partition(":")
    return HubSet(repo, _TRAIN_AND_TEST, config=config or None)


def _read_file(name: str, path: Path) -> Text:
    """Read a file of text or rows, without ``datasets``, which would copy it to its cache."""
    if path.suffix == ".parquet":
        return _of_rows(name, FILE, parquet_rows(path))
    content = read_plain(path)
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
            f"Cannot download '{name}' ({hub.repo}, split {split}) from the Hub: {reason(error)}",
            "Check the name and the network, or give a local .txt, .jsonl or .parquet file.",
        ) from error


def _of_rows(name: str, split: str, rows: Iterator[object]) -> Text:
    """Return the text or the conversations of rows, depending on the first row."""
    first = next(rows, None)
    known = first if isinstance(first, dict) else {}
    given = rows if first is None else chain([first], rows)
    if is_chat(known) and not any(column in known for column in _TEXT_COLUMNS):
        numbered = enumerate((row if isinstance(row, dict) else {} for row in given), 1)
        return _of_chats(name, split, (messages_of(row, name, i) for i, row in numbered))
    return Text(name, split, _join_rows(given, name))


def _join_rows(rows: Iterable[object], name: str) -> str:
    """Return the joined texts of rows, empty ones included. The column is that of the first row."""
    texts: list[str] = []
    column = None
    for number, row in enumerate(rows, 1):
        known = row if isinstance(row, dict) else {}
        column = column or next((c for c in _TEXT_COLUMNS if c in known), None)
        if column is None:
            raise DataError(
                f"Row {number} of '{name}' has no text column; it has "
                f"{', '.join(map(str, known)) or 'none'}.",
                f"Name the text column {' or '.join(_TEXT_COLUMNS)}, or give conversations in a "
                "column messages.",
            )
        if (text := known.get(column)) is not None:
            texts.append(str(text))
    return _JOIN.join(texts)
