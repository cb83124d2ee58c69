"""Training data for recovery: windows of a text, or instructions with answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.calibration.text.datasets import (
    INSTRUCTION,
    Text,
    load_instructions,
    load_text,
    without,
)
from hisvd_cli.calibration.text.token_ids import known_ids
from hisvd_cli.calibration.text.tokens import count_windows, tokenize
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import DataError
from hisvd_cli.utils.files.fingerprints import digest

HELD_OUT_TOKENS = 4096
"""Maximum number of held-out tokens; at most a sixteenth of the text is held out."""
_FIELDS = (INSTRUCTION, "output")
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class TrainingData:
    """Windows of tokens to train on.

    Attributes:
        ids: tokens ``[N, L]``, padded on the right.
        counted: whether the prediction at a position is trained on ``[N, L]``; always False for
            the last one.
        dataset: name of the text.
        kind: text or instructions.
        key: sha256 of its content.
    """

    ids: Tensor
    counted: Tensor
    dataset: str
    kind: str
    key: str

    @property
    def tokens(self) -> int:
        """Number of tokens to train on."""
        return int(self.counted.sum())

    def rows(self, start: int, stop: int) -> TrainingData:
        """Return the windows from ``start`` up to, but not including, ``stop``."""
        return replace(self, ids=self.ids[start:stop], counted=self.counted[start:stop])

    def held_out(self) -> int:
        """Return how many of the last windows are held out. Raises DataError."""
        total, length = self.ids.shape
        if total < 2:
            raise DataError(
                f"'{self.dataset}' has only {total} window of {length} tokens; training needs at "
                "least 2, one of them held out.",
                "Lower `recover.seqlen`, or give a longer text.",
            )
        return max(1, min(HELD_OUT_TOKENS // length, total // 16))

    def split(self) -> tuple[int, Tensor]:
        """Return the number of windows to train on and the indices of the held-out ones, which
        follow. Raises DataError."""
        total = len(self.ids)
        trained = total - self.held_out()
        return trained, torch.arange(trained, total)


def text_data(text: Text, source: Source, seqlen: int) -> TrainingData:
    """Return the non-overlapping windows of a text. Raises DataError if there are none."""
    return windows_of(tokenize(text, source), seqlen, text.name, text.digest)


def windows_of(tokens: Tensor, seqlen: int, dataset: str, key: str) -> TrainingData:
    """Return the non-overlapping windows of tokens ``[T]``. Raises DataError if there are none."""
    total = count_windows(tokens, seqlen, dataset, "recover.seqlen")
    ids = tokens[: total * seqlen].view(total, seqlen)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    return TrainingData(ids, counted, dataset, "text", key)


def instruction_data(
    rows: Iterable[Mapping[str, Any]], source: Source, seqlen: int, dataset: str
) -> TrainingData:
    """Return instructions in the prompt format of Alpaca (Taori et al. 2023); only answers are
    trained on.

    Rows are truncated to ``seqlen`` tokens; rows without any token of the answer are dropped.

    Raises:
        DataError: a row lacks a field, no row remains, or the model has no embedding for a token.
    """
    tokenizer = source.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kept: list[tuple[list[int], int]] = []
    texts = []
    for number, row in enumerate(rows, 1):
        prompt, answer = _prompt(row, dataset, number)
        texts.append((prompt, answer))
        first = list(tokenizer(prompt)["input_ids"])
        if tokenizer.eos_token_id is not None and first[-1:] == end and len(first) > 1:
            first = first[:-1]  # some tokenizers append EOS to every text
        second = list(tokenizer(answer, add_special_tokens=False)["input_ids"]) + end
        if len(first) < seqlen:
            kept.append(((first + second)[:seqlen], len(first)))
    if not kept:
        raise DataError(
            f"No row of '{dataset}' has an answer within {seqlen} tokens.",
            "Raise `recover.seqlen`, or give another dataset.",
        )
    ids = torch.zeros((len(kept), seqlen), dtype=torch.long)
    counted = torch.zeros((len(kept), seqlen), dtype=torch.bool)
    for i, (tokens, prompt_length) in enumerate(kept):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        counted[i, max(prompt_length - 1, 0) : len(tokens) - 1] = True
    known = known_ids(ids, source)
    return TrainingData(known, counted, dataset, "instructions", digest(json.dumps(texts)))


def _prompt(row: Mapping[str, Any], dataset: str, number: int) -> tuple[str, str]:
    """Return the prompt and the answer of a row. Raises DataError."""
    lacking = [name for name in _FIELDS if not isinstance(row.get(name), str)]
    if lacking:
        raise DataError(
            f"Row {number} of '{dataset}' has no text in {' and '.join(lacking)}; its fields are "
            f"{', '.join(map(str, row)) or 'none'}.",
            "Each row needs instruction and output, and may have input.",
        )
    template = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
    fields = {name: str(row.get(name) or "") for name in ("instruction", "input")}
    return template.format(**fields), row["output"]


def load_training_data(name: str, source: Source, seqlen: int, drop: str = "") -> TrainingData:
    """Load a text or instruction data, which is recognized by its fields.

    Args:
        name: as in :func:`hisvd_cli.calibration.text.datasets.load_text`.
        source: the model whose tokenizer is used.
        seqlen: tokens per window.
        drop: string to remove from a text, with the space before it.

    Raises:
        DataError: the name is unknown, rows lack fields, or the text is too short.
    """
    rows = load_instructions(name)
    if rows is not None:
        return instruction_data(rows, source, seqlen, name)
    return text_data(without(load_text(name, "calibration"), drop), source, seqlen)
