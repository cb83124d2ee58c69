"""What the dense model says of the training text: its decoder runs over each window once."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.decoding import TwoParts

_KNOWN = "known.bin"
_STATES = "states.bin"


class Teacher:
    """The dense model's final hidden states of windows, kept in a file as they are first needed.

    They are vocabulary ÷ width times smaller than logits, and the head makes the same logits of
    them again. The file is sparse: what is not reached takes no space.

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
        self._known = _mapped(folder / _KNOWN, (len(tokens),), torch.uint8)

    def states(self, rows: Tensor) -> Tensor:
        """Return the states ``[B, L, d]`` of windows ``[B]``."""
        missing = rows[self._known[rows] == 0]
        if len(missing):
            with torch.no_grad():
                found = self._parts.states(self._tokens[missing])
            self._states[missing] = found.to("cpu", self._states.dtype)
            self._known[missing] = 1
        return self._states[rows].to(self._parts.model.device)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that lies in a file; a new file holds zeros."""
    return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)
