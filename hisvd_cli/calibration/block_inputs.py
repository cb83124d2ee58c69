"""The hidden states that enter each block, kept on disk between a forward and a reverse walk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hisvd_cli.modeling.hidden_states import StatesHome
from hisvd_cli.modeling.rows import RowFiles

INPUTS = "inputs"
"""Name of the folder, in that of a calibration; gone once the gradients are there."""


@dataclass(frozen=True)
class BlockInputs:
    """Hidden states ``[S, L, d]`` by block; index N, the number of blocks, is the last's output."""

    folder: Path

    def _files(self, index: int) -> RowFiles:
        return RowFiles(self.folder, f"input-{index:05d}")

    def has(self, index: int, count: int) -> bool:
        """Tell whether the input of block ``index`` is kept, of all ``count`` sequences; files that
        were damaged are removed."""
        return self._files(index).sound(count)

    def keep(self, index: int, first: int, hidden: Tensor, home: StatesHome) -> None:
        """Write the input of block ``index``, of sequences from ``first`` on. Raises
        OutputError."""
        self.folder.mkdir(exist_ok=True)
        self._files(index).keep(first, hidden, home)

    def load(self, index: int, start: int, end: int, home: StatesHome) -> Tensor:
        """Return sequences ``start`` to ``end`` of the input of block ``index``, in memory of
        ``home``.

        Raises:
            SourceError, OutputError: it cannot be read, or there is no space for it.
        """
        return self._files(index).load(start, end, home)

    def part(self, index: int, start: int, end: int) -> Tensor:
        """Return sequences ``start`` to ``end`` of the input of block ``index``, read alone. Raises
        SourceError."""
        return self._files(index).read(start, end)

    def remove(self) -> None:
        """Give back the disk space."""
        shutil.rmtree(self.folder, ignore_errors=True)
