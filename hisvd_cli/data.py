"""Text by name ─► tokens: named sets, hub ids, local files; seeded and hashed.

Perplexity and calibration read a text in the same way: the split's documents are joined by blank
lines, tokenized once with the tokenizer's own special tokens, and cut into windows that do not
overlap. No window gets a BOS of its own; the text gets one where the tokenizer adds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hisvd_cli.errors import DataError, suggest
from hisvd_cli.paths import digest
from hisvd_cli.source import DEMO, DEMO_FOLDER

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.source import Source

Purpose = Literal["calibration", "evaluation"]
_JOIN = "\n\n"
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_COLUMNS = ("text", "sentence", "content", "document")


@dataclass(frozen=True)
class HubSet:
    """A set on the hub: its id, configuration, the split of each purpose, and how much of it."""

    repo: str
    config: str | None
    splits: dict[Purpose, str]
    files: dict[Purpose, str] | None = None
    limit: int | None = None


NAMED = {
    "wikitext2": HubSet(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "evaluation": "test"},
    ),
    "c4": HubSet(
        "allenai/c4",
        None,
        {"calibration": "train", "evaluation": "validation"},
        {
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        limit=20_000,
    ),
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only", None, {"calibration": "train", "evaluation": "test"}
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


def load_text(name: str, purpose: Purpose) -> Text:
    """Load a text: an existing file wins, then the named sets, then a hub id.

    Args:
        name: path of a .txt, .jsonl, .json or .parquet file; wikitext2, c4, ptb or demo; or a hub
            id, with ``:configuration`` behind it where the set has several.
        purpose: decides the split: train for calibration, test for evaluation.

    Raises:
        DataError: nothing by that name, it cannot be fetched, or it holds no text.
    """
    path = Path(name).expanduser()
    if path.is_file():
        text = Text(name, "file", _read_file(path))
    elif name == DEMO:
        content = (DEMO_FOLDER / f"{purpose}.txt").read_text(encoding="utf-8")
        text = Text(name, purpose, content)
    elif path.suffix in {".txt", *_FILE_KINDS} or name.startswith((".", "/", "~")):
        raise DataError(f"There is no file '{name}'.", "Check the path.")
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


def _custom(name: str) -> HubSet:
    repo, _, config = name.partition(":")
    return HubSet(repo, config or None, {"calibration": "train", "evaluation": "test"})


def _read_file(path: Path) -> str:
    if kind := _FILE_KINDS.get(path.suffix):
        import datasets

        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            raise DataError(
                f"{path} is no readable {path.suffix} file.", "Check its content."
            ) from error
        return _join_rows(rows, str(path), None)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text.", "Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.", "Check the file.") from error


def _load_hub(name: str, hub: HubSet, purpose: Purpose) -> Text:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    split = hub.splits[purpose]
    files = {"data_files": {split: hub.files[purpose]}} if hub.files else {}
    try:
        rows = datasets.load_dataset(
            hub.repo, hub.config, split=split, streaming=hub.limit is not None, **files
        )
        content = _join_rows(rows, name, hub.limit)
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"Cannot fetch '{name}' ({hub.repo}, split {split}) from the hub: {first}",
            "Check name and network, or give a local .txt, .jsonl or .parquet file instead.",
        ) from error
    return Text(name, split, content)


def _join_rows(rows: Any, name: str, limit: int | None) -> str:
    names = list(rows.column_names or [])
    column = next((c for c in _TEXT_COLUMNS if c in names), None)
    if column is None:
        raise DataError(
            f"'{name}' has no text column; it has {', '.join(names) or 'none'}.",
            f"Name the column one of: {', '.join(_TEXT_COLUMNS)}.",
        )
    chosen = rows.take(limit) if limit is not None else rows
    return _JOIN.join(str(row[column]) for row in chosen)


def tokenize(text: Text, source: Source) -> Tensor:
    """Return the token ids ``[T]`` of a whole text, tokenized once."""
    import torch

    # The whole text is one sequence, longer than the model's window: that is meant, not a mistake.
    ids = source.tokenizer(text.content, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


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
            f"Lower --seqlen to {len(tokens)} or less, or give a longer text.",
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
