"""The hidden states that enter each block, kept on disk between a forward and a reverse walk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hisvd_cli.tensorfile import read_tensors, write_tensors

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

    def keep(self, index: int, hidden: Tensor) -> None:
        """Write the input of block ``index``. Raises OutputError."""
        self.folder.mkdir(exist_ok=True)
        write_tensors(self._path(index), {"hidden": hidden}, {})

    def read(self, index: int) -> Tensor:
        """Return the input of block ``index`` ``[S, L, d]``. Raises SourceError."""
        return read_tensors(self._path(index), f"Remove {self.folder} and run again.")[0]["hidden"]

    def part(self, index: int, start: int, end: int) -> Tensor:
        """Return sequences ``start`` to ``end`` of the input of block ``index``, read alone."""
        with safe_open(self._path(index), framework="pt") as file:
            part: Tensor = file.get_slice("hidden")[start:end]
        return part.clone(memory_format=torch.contiguous_format)

    def remove(self) -> None:
        """Give back the disk space."""
        shutil.rmtree(self.folder, ignore_errors=True)
