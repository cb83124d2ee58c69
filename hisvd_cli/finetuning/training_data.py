"""What a recovery is trained on: windows of a text, or instructions with their answers."""

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
from hisvd_cli.calibration.text.tokens import tokenize
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import DataError
from hisvd_cli.utils.files.fingerprints import digest

HELD_OUT_TOKENS = 4096
"""So many tokens at most are held back, and no more than a sixteenth of the text."""
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
class Lessons:
    """Windows of tokens to train on.

    Attributes:
        ids: tokens ``[N, L]``, filled up at the right where a lesson is shorter.
        counted: whether what a position predicts counts ``[N, L]``; never of the last one.
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
        """Predicted tokens that count."""
        return int(self.counted.sum())

    def rows(self, start: int, stop: int) -> Lessons:
        """Return the windows from ``start`` to before ``stop``."""
        return replace(self, ids=self.ids[start:stop], counted=self.counted[start:stop])

    def held_out(self) -> int:
        """Return how many windows, the last ones, are held back. Raises DataError."""
        total, length = self.ids.shape
        if total < 2:
            raise DataError(
                f"'{self.dataset}' holds {total} windows of {length} tokens: too few to train on "
                "some and measure on others.",
                "Lower --recover-seqlen, or give a longer text.",
            )
        return max(1, min(HELD_OUT_TOKENS // length, total // 16))


def text_lessons(text: Text, source: Source, seqlen: int) -> Lessons:
    """Cut a text into windows that do not overlap. Raises DataError: not even one."""
    return windows_of(tokenize(text, source), seqlen, text.name, text.digest)


def windows_of(tokens: Tensor, seqlen: int, dataset: str, key: str) -> Lessons:
    """Cut tokens ``[T]`` into windows that do not overlap. Raises DataError: not even one."""
    total = len(tokens) // seqlen
    if total == 0:
        raise DataError(
            f"'{dataset}' holds {len(tokens):,} tokens, too few for one window of {seqlen}.",
            "Lower --recover-seqlen, or give a longer text.",
        )
    ids = tokens[: total * seqlen].view(total, seqlen)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    return Lessons(ids, counted, dataset, "text", key)


def instruction_lessons(
    rows: Iterable[Mapping[str, Any]], source: Source, seqlen: int, dataset: str
) -> Lessons:
    """Return instructions in the words of Alpaca (Taori et al. 2023): only answers count.

    What is longer than ``seqlen`` is cut off; a row whose answer is cut off whole is left out.

    Raises:
        DataError: a row lacks a field, no row is left, or the model has no embedding for a token.
    """
    tokenizer = source.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kept: list[tuple[list[int], int]] = []
    said = []
    for number, row in enumerate(rows, 1):
        prompt, answer = _prompt(row, dataset, number)
        said.append((prompt, answer))
        asked = list(tokenizer(prompt)["input_ids"])
        if tokenizer.eos_token_id is not None and asked[-1:] == end and len(asked) > 1:
            asked = asked[:-1]  # some tokenizers end every text
        answered = list(tokenizer(answer, add_special_tokens=False)["input_ids"]) + end
        if len(asked) < seqlen:
            kept.append(((asked + answered)[:seqlen], len(asked)))
    if not kept:
        raise DataError(
            f"No row of '{dataset}' has an answer within {seqlen} tokens.",
            "Raise --recover-seqlen, or give another set.",
        )
    ids = torch.zeros((len(kept), seqlen), dtype=torch.long)
    counted = torch.zeros((len(kept), seqlen), dtype=torch.bool)
    for i, (tokens, prompt_length) in enumerate(kept):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        counted[i, max(prompt_length - 1, 0) : len(tokens) - 1] = True
    known = known_ids(ids, source)
    return Lessons(known, counted, dataset, "instructions", digest(json.dumps(said)))


def _prompt(row: Mapping[str, Any], dataset: str, number: int) -> tuple[str, str]:
    """Return what is asked, and what is to be answered. Raises DataError."""
    lacking = [name for name in _FIELDS if not isinstance(row.get(name), str)]
    if lacking:
        raise DataError(
            f"Row {number} of '{dataset}' has no text under {' and '.join(lacking)}; it has "
            f"{', '.join(map(str, row)) or 'nothing'}.",
            "Each row needs instruction and output, and may have input.",
        )
    template = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
    asked = {name: str(row.get(name) or "") for name in ("instruction", "input")}
    return template.format(**asked), row["output"]


def load_lessons(name: str, source: Source, seqlen: int, drop: str = "") -> Lessons:
    """Load a text or a set of instructions, by name or file, told apart by its fields.

    Args:
        name: as in :func:`hisvd_cli.calibration.text.datasets.load_text`.
        source: the model whose tokenizer reads it.
        seqlen: tokens per window.
        drop: left out of a text wherever it stands, with the space before it.

    Raises:
        DataError: nothing by that name, rows without the expected fields, or too short a text.
    """
    rows = load_instructions(name)
    if rows is not None:
        return instruction_lessons(rows, source, seqlen, name)
    return text_lessons(without(load_text(name, "calibration"), drop), source, seqlen)
