"""A tensor ``[S, …]`` stored as several files of rows.

Each process writes its own rows; a later run with any number of processes can read any rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hisvd_cli.modeling.hidden_states import NAME, StatesHome, chunks
from hisvd_cli.utils.errors import SourceError, reason
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.tensorfile import AGAIN

_SPAN = re.compile(r"(\d+)-(\d+)\.safetensors")


@dataclass(frozen=True)
class RowFiles:
    """The files of one tensor: ``STEM.FIRST-END.safetensors`` in ``folder``."""

    folder: Path
    stem: str

    def keep(self, first: int, rows: Tensor, home: StatesHome) -> None:
        """Write rows, allocated by ``home``, that begin at row ``first``; nothing if empty. Raises
        OutputError."""
        if len(rows):
            name = f"{self.stem}.{first:06d}-{first + len(rows):06d}.safetensors"
            home.save(self.folder / name, rows)

    def _spans(self) -> list[tuple[int, int, Path]]:
        paths = sorted(self.folder.glob(f"{self.stem}.*.safetensors"))
        found = ((_SPAN.fullmatch(path.name[len(self.stem) + 1 :]), path) for path in paths)
        return [(int(span[1]), int(span[2]), path) for span, path in found if span]

    def _pieces(self, start: int, end: int) -> list[tuple[Path, slice]] | None:
        """Return the (file, rows in it) that cover rows ``start`` to ``end``; None if any are
        missing."""
        pieces = []
        spans = self._spans()
        while start < end:
            covering = [span for span in spans if span[0] <= start < span[1]]
            if not covering:
                return None
            first, last, path = max(covering, key=lambda span: span[1])
            until = min(last, end)
            pieces.append((path, slice(start - first, until - first)))
            start = until
        return pieces

    def sound(self, count: int) -> bool:
        """Return whether rows 0 to ``count`` are complete, after removing damaged files."""
        for _, _, path in self._spans():
            if not intact(path):
                path.unlink(missing_ok=True)
        return self._pieces(0, count) is not None

    def read(self, start: int, end: int) -> Tensor:
        """Return rows ``start`` to ``end`` (exclusive), reading no others.

        Raises:
            SourceError: rows are missing, or a file is damaged.
        """
        pieces = self._pieces(start, end)
        if pieces is None:
            raise SourceError(f"{self.folder} lacks rows {start} to {end} of {self.stem}.", AGAIN)
        parts = [_read(path, which) for path, which in pieces]
        return torch.cat(parts) if parts else torch.empty(0)

    def load(self, start: int, end: int, home: StatesHome) -> Tensor:
        """Return rows ``start`` to ``end`` in memory allocated by ``home``, read in chunks.

        Raises:
            SourceError: see :meth:`read`.
            OutputError: there is no space for them.
        """
        if start == end:
            return torch.empty(0)
        row = self.read(start, start + 1)
        states = home.take((end - start, *row.shape[1:]), row.dtype)
        for first, part in chunks(states):
            part.copy_(self.read(start + first, start + first + len(part)))
            home.settle()
        return states


def _read(path: Path, which: slice) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            part: Tensor = file.get_slice(NAME)[which]
            return part
    except (SafetensorError, OSError) as error:
        raise SourceError(f"Cannot read {path}: {reason(error)}", AGAIN) from error


@dataclass(frozen=True)
class Checkpoints:
    """Intermediate tensors of a walk, saved at some blocks so that a run can resume there.

    Attributes:
        folder: folder of the files.
        name: name of the tensor; files are named ``NAME-BLOCK.FIRST-END.safetensors``.
        count: number of rows.
    """

    folder: Path
    name: str
    count: int

    def at(self, block: int) -> RowFiles:
        """Return the files of the input of ``block``."""
        return RowFiles(self.folder, f"{self.name}-{block:05d}")

    def blocks(self) -> list[int]:
        """Return the blocks with complete rows, after removing damaged files."""
        stems = {path.name.partition(".")[0] for path in self.folder.glob(f"{self.name}-*.*")}
        blocks = sorted(int(stem.rpartition("-")[2]) for stem in stems)
        return [block for block in blocks if self.at(block).sound(self.count)]

    def remove(self, but: int | None = None) -> None:
        """Remove all files except those of block ``but``."""
        for path in self.folder.glob(f"{self.name}-*.safetensors"):
            if but is None or not path.name.startswith(f"{self.name}-{but:05d}."):
                path.unlink(missing_ok=True)
