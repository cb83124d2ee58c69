"""The hidden states that enter each block, kept on disk between a forward and a reverse walk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hisvd_cli.hidden_states import NAME, StatesHome

INPUTS = "inputs"
"""Name of the folder, in that of a calibration; gone once the gradients are there."""


@dataclass(frozen=True)
class BlockInputs:
    """One file a block with ``[S, L, d]``; index N, the number of blocks, is the last's output."""

    folder: Path

    def _path(self, index: int) -> Path:
        return self.folder / f"input-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Tell whether the input of block ``index`` is kept."""
        return self._path(index).is_file()

    def keep(self, index: int, hidden: Tensor, home: StatesHome) -> None:
        """Write the input of block ``index``. Raises OutputError."""
        self.folder.mkdir(exist_ok=True)
        home.save(self._path(index), hidden, {})

    def read(self, index: int, home: StatesHome) -> Tensor:
        """Return the input of block ``index`` ``[S, L, d]``, in memory of ``home``.

        Raises:
            SourceError, OutputError: it cannot be read, or there is no space for it.
        """
        return home.load(self._path(index), f"Remove {self.folder} and run again.")[0]

    def part(self, index: int, start: int, end: int) -> Tensor:
        """Return sequences ``start`` to ``end`` of the input of block ``index``, read alone."""
        with safe_open(self._path(index), framework="pt") as file:
            part: Tensor = file.get_slice(NAME)[start:end]
        return part.clone(memory_format=torch.contiguous_format)

    def remove(self) -> None:
        """Give back the disk space."""
        shutil.rmtree(self.folder, ignore_errors=True)
