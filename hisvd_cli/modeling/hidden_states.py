"""Where the hidden states of a walk live: on the device, in host memory, or in a mapped file.

They are the only part of a walk that grows with the text. Wherever they live they are one tensor
``[S, L, d]``, of which a walk takes a few sequences at a time. Legend: as in
:mod:`hisvd_cli.modeling.block_walk`.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hisvd_cli.utils.errors import OutputError, reason
from hisvd_cli.utils.files.cache import write_hint
from hisvd_cli.utils.files.tensorfile import write_parts

Place = Literal["device", "host", "file"]
NAME = "hidden"
"""Name of the tensor in files of states."""
_CHUNK = 1 << 25
"""Bytes of states that are copied at a time."""


class StatesHome:
    """Gives out memory for the states of one walk.

    Args:
        device: where blocks run.
        place: where the states live.
        folder: where the file goes that holds them. It has no name there: whatever ends the
            process, its space comes back.
    """

    def __init__(
        self, device: torch.device, place: Place = "device", folder: Path = Path()
    ) -> None:
        self._device = device if place == "device" else torch.device("cpu")
        self._folder = folder if place == "file" else None
        self._map: mmap.mmap | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor whose content is not defined yet, in place of the one before.

        Raises:
            OutputError: no space for the file.
        """
        if self._folder is None:
            return torch.empty(*shape, dtype=dtype, device=self._device)
        size = prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                reserve(file.fileno(), size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"Cannot keep {size / 1e9:.1f} GB of hidden states in {self._folder}: "
                f"{reason(error)}",
                write_hint(self._folder),
            ) from error
        return torch.frombuffer(self._map, dtype=dtype).view(*shape)

    def settle(self) -> None:
        """Let go of the pages of the file that were read and written: they are in it."""
        if self._map is not None:
            settle(self._map)

    def save(self, path: Path, states: Tensor) -> None:
        """Write states, without a copy of all of them. Raises OutputError."""
        write_parts(path, NAME, [part for _, part in chunks(states)], {}, self.settle)


def settle(mapped: mmap.mmap) -> None:
    """Let go of the pages of a mapped file, which holds what they hold."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def chunks(states: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield states ``[S, …]`` a few at a time, each part with the number of its first."""
    rows = max(1, _CHUNK // (states[0].numel() * states.element_size()))
    for start in range(0, len(states), rows):
        yield start, states[start : start + rows]


def reserve(file: int, size: int) -> None:
    """Make an open file that long, and take its blocks now: a disk that is full later would end the
    process (SIGBUS) where a map of the file is written, and it now raises OSError."""
    before = os.fstat(file).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
            return
        os.lseek(file, before, os.SEEK_SET)
        while (left := size - os.fstat(file).st_size) > 0:
            os.write(file, bytes(min(left, _CHUNK)))
    except OSError:
        os.ftruncate(file, before)  # what was taken of it comes back
        raise
