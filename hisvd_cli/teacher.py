"""What the dense model says of the training text: its decoder runs over each window once."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_64

from hisvd_cli.decoding import TwoParts

_KNOWN = "known.bin"
_STATES = "states.bin"


class Teacher:
    """The dense model's final hidden states of windows, kept in a file as they are first needed.

    What an earlier run kept is used again where its checksum is right. They are vocabulary ÷ width
    times smaller than logits, and the head makes the same logits of them again. The file is sparse:
    what is not reached takes no space.

    Args:
        parts: the dense model.
        tokens: all windows ``[N, L]``.
        width: of its hidden states.
        folder: where they are kept.
    """

    def __init__(self, parts: TwoParts, tokens: Tensor, width: int, folder: Path) -> None:
        self.head = parts.head
        self._parts = parts
        self._tokens = tokens
        dtype = next(parts.model.parameters()).dtype
        folder.mkdir(exist_ok=True)
        self._states = _mapped(folder / _STATES, (*tokens.shape, width), dtype)
        self._known = _mapped(folder / _KNOWN, (len(tokens),), torch.int64)
        self._checked: set[int] = set()

    def states(self, rows: Tensor) -> Tensor:
        """Return the states ``[B, L, d]`` of windows ``[B]``."""
        missing = torch.tensor([row for row in rows.tolist() if not self._holds(row)])
        if len(missing):
            with torch.no_grad():
                found = self._parts.states(self._tokens[missing])
            self._states[missing] = found.to("cpu", self._states.dtype)
            for row in missing.tolist():
                self._known[row] = self._checksum(row)
        self._checked.update(rows.tolist())
        return self._states[rows].to(self._parts.model.device)

    def _holds(self, row: int) -> bool:
        """Tell whether the states of a window are kept as they were written."""
        return row in self._checked or int(self._known[row]) == self._checksum(row)

    def _checksum(self, row: int) -> int:
        """Return a checksum of the states of a window, never that of none, 0."""
        data = self._states[row].view(torch.uint8).numpy().data
        return xxh3_64(data).intdigest() >> 1 or 1


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that lies in a file; a new file holds zeros."""
    return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)
