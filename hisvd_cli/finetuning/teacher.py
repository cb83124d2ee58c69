"""What the dense model says of the training text: its decoder runs over each window once."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_64

from hisvd_cli.modeling.decoding import TwoParts
from hisvd_cli.modeling.hidden_states import reserve, settle
from hisvd_cli.utils.errors import OutputError, reason

_KNOWN = "known.bin"
_STATES = "states.bin"


class Teacher:
    """The dense model's final hidden states of windows, kept in a file as they are first needed.

    They are vocabulary ÷ width times smaller than logits, and the head makes the same logits of
    them again. What an earlier run kept is used again where its checksum is right. Space for all of
    them is taken at the start, so that a full disk does not stop the training midway.

    Args:
        parts: the dense model.
        tokens: all windows ``[N, L]``.
        width: of its hidden states.
        folder: where they are kept.

    Raises:
        OutputError: there is no space for them.
    """

    def __init__(self, parts: TwoParts, tokens: Tensor, width: int, folder: Path) -> None:
        self.head = parts.head
        self._parts = parts
        self._tokens = tokens
        dtype = next(parts.model.parameters()).dtype
        self._states, self._map = _mapped(folder / _STATES, (*tokens.shape, width), dtype)
        self._known, _ = _mapped(folder / _KNOWN, (len(tokens),), torch.int64)
        self._checked: set[int] = set()

    def states(self, rows: Tensor) -> Tensor:
        """Return the states ``[B, L, d]`` of windows ``[B]``."""
        missing = torch.tensor([row for row in rows.tolist() if not self._holds(row)])
        if len(missing):
            with torch.no_grad():
                made = self._parts.states(self._tokens[missing])
            self._states[missing] = made.to("cpu", self._states.dtype)
            for row in missing.tolist():
                self._known[row] = self._checksum(row)
        self._checked.update(rows.tolist())
        found = self._states[rows].to(self._parts.model.device)
        settle(self._map)
        return found

    def _holds(self, row: int) -> bool:
        """Tell whether the states of a window are kept as they were written."""
        return row in self._checked or int(self._known[row]) == self._checksum(row)

    def _checksum(self, row: int) -> int:
        """Return a checksum of the states of a window, never that of none, 0."""
        data = self._states[row].view(torch.uint8).numpy().data
        return xxh3_64(data).intdigest() >> 1 or 1


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, mmap.mmap]:
    """Return a tensor that lies in a file, and the map that it lies in; a new file holds zeros.
    Raises OutputError."""
    size = prod(shape) * dtype.itemsize
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            reserve(file.fileno(), size)
        with path.open("rb+") as file:
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise OutputError(
            f"Cannot keep {size / 1e9:.2f} GB of the dense model's hidden states in "
            f"{path.parent}: {reason(error)}",
            "Free some space, name another --output, or lower --recover-samples or "
            "--recover-seqlen.",
        ) from error
    return torch.frombuffer(mapped, dtype=dtype).view(shape), mapped
