"""Storage of a block walk's hidden states: on the device, in host memory or in a mapped file.

Hidden states are the only part of a walk that grows with the text. They are one tensor
``[S, L, d]`` in any storage, processed a few sequences at a time. Legend: as in
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
"""Name of the tensor in files of hidden states."""
_CHUNK = 1 << 25
"""Bytes copied at a time."""


class StatesHome:
    """Allocates memory for the hidden states of one walk.

    Args:
        device: device on which blocks run.
        place: where the states are stored.
        folder: folder of the file, if any. The file is unlinked, so that its space is freed
            however the process ends.
    """

    def __init__(
        self, device: torch.device, place: Place = "device", folder: Path = Path()
    ) -> None:
        self._device = device if place == "device" else torch.device("cpu")
        self._folder = folder if place == "file" else None
        self._map: mmap.mmap | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor, which replaces an earlier one.

        Raises:
            OutputError: there is no space for the file.
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
                f"Cannot store {size / 1e9:.1f} GB of hidden states in {self._folder}: "
                f"{reason(error)}",
                write_hint(self._folder, error),
            ) from error
        return torch.frombuffer(self._map, dtype=dtype).view(*shape)

    def settle(self) -> None:
        """Release the pages of the file from memory."""
        if self._map is not None:
            settle(self._map)

    def save(self, path: Path, states: Tensor) -> None:
        """Write states to a file in chunks. Raises OutputError."""
        write_parts(path, NAME, [part for _, part in chunks(states)], {}, self.settle)


def settle(mapped: mmap.mmap) -> None:
    """Release the pages of a mapped file from memory; their content stays in the file."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def chunks(states: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows) for chunks of states ``[S, …]``."""
    rows = max(1, _CHUNK // (states[0].numel() * states.element_size()))
    for start in range(0, len(states), rows):
        yield start, states[start : start + rows]


def reserve(file: int, size: int) -> None:
    """Extend an open file to ``size`` bytes and allocate its blocks, so that a full disk raises
    OSError here instead of SIGBUS when the mapped file is written."""
    before = os.fstat(file).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
            return
        os.lseek(file, before, os.SEEK_SET)
        while (left := size - os.fstat(file).st_size) > 0:
            os.write(file, bytes(min(left, _CHUNK)))
    except OSError:
        os.ftruncate(file, before)  # frees the blocks allocated so far
        raise
