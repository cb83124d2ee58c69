"""Inputs of all blocks, kept on disk between a forward and a reverse walk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hisvd_cli.modeling.hidden_states import StatesHome
from hisvd_cli.modeling.rows import RowFiles

INPUTS = "inputs"
"""Folder inside that of a calibration; it is removed once the gradients are written."""


@dataclass(frozen=True)
class BlockInputs:
    """Hidden states ``[S, L, d]`` by block; index N, the number of blocks, is the last output."""

    folder: Path

    def _files(self, index: int) -> RowFiles:
        return RowFiles(self.folder, f"input-{index:05d}")

    def has(self, index: int, count: int) -> bool:
        """Return whether the input of block ``index`` is stored for all ``count`` sequences;
        damaged files are removed."""
        return self._files(index).sound(count)

    def keep(self, index: int, first: int, hidden: Tensor, home: StatesHome) -> None:
        """Write the input of block ``index`` for sequences from ``first`` on. Raises
        OutputError."""
        self.folder.mkdir(exist_ok=True)
        self._files(index).keep(first, hidden, home)

    def load(self, index: int, start: int, end: int, home: StatesHome) -> Tensor:
        """Return sequences ``start`` to ``end`` of the input of block ``index``, in memory from
        ``home``.

        Raises:
            SourceError, OutputError: the file cannot be read, or there is no space.
        """
        return self._files(index).load(start, end, home)

    def part(self, index: int, start: int, end: int) -> Tensor:
        """Return sequences ``start`` to ``end`` of the input of block ``index`` without memory from
        a ``home``. Raises SourceError."""
        return self._files(index).read(start, end)

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
