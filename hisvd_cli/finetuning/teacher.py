"""Final hidden states of the dense model on the training windows, each computed once."""

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
    """Computes final hidden states of windows on first use and keeps them in a file.

    Hidden states are smaller than logits by vocabulary size over width, and the output head
    reproduces the logits. States from an earlier run are reused if their checksum matches. Disk
    space for all of them is reserved at the start.

    Args:
        parts: the dense model.
        tokens: all windows ``[N, L]``.
        width: width of the hidden states.
        folder: folder of the file.

    Raises:
        OutputError: there is not enough space.
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
        """Return whether the states of a window are stored and not damaged."""
        return row in self._checked or int(self._known[row]) == self._checksum(row)

    def _checksum(self, row: int) -> int:
        """Return the checksum of the states of a window; 0 is reserved for missing ones."""
        data = self._states[row].view(torch.uint8).numpy().data
        return xxh3_64(data).intdigest() >> 1 or 1


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, mmap.mmap]:
    """Return a tensor that is mapped to a file, and the mapping; a new file is filled with zeros.
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
            f"Cannot store {size / 1e9:.2f} GB of hidden states of the dense model in "
            f"{path.parent}: {reason(error)}",
            "Free some space, choose another `output`, or lower `recover.samples` or "
            "`recover.seqlen`.",
        ) from error
    return torch.frombuffer(mapped, dtype=dtype).view(shape), mapped
