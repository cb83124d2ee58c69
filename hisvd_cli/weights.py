"""The tensors of a model folder, found by name and read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hisvd_cli.errors import NumericalError, SourceError
from hisvd_cli.tensorfile import TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """Tensors of one folder.

    Attributes:
        infos: name → dtype, shape and byte range, for every tensor on disk.
        where: name → file.
    """

    infos: dict[str, TensorInfo]
    where: dict[str, Path]
    _legacy: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> list[Path]:
        """The weight files, each once, sorted by name."""
        return sorted(set(self.where.values()))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            SourceError: the file is damaged.
            NumericalError: the tensor holds NaN or infinity.
        """
        path = self.where[name]
        known = self._legacy.get(path)
        tensor = known[name] if known else _read_safetensor(path, name)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise NumericalError(
                f"{name} in {path.name} holds {bad} values that are NaN or infinite.",
                "The model itself is damaged: fetch it again or use another checkpoint.",
            )
        return tensor


def _read_safetensor(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"Cannot read {name} from {path}: {error}.", "Fetch it again.") from error
    return tensor


def open_weights(folder: Path) -> Weights:
    """Index the weights of a folder: safetensors, sharded or single, else ``.bin`` files.

    Raises:
        SourceError: no weights, a missing shard, or a damaged file.
    """
    files = _weight_files(folder)
    if not files:
        raise SourceError(
            f"{folder} holds no weights (*.safetensors or pytorch_model*.bin).",
            "Give the folder that holds the weights.",
        )
    infos: dict[str, TensorInfo] = {}
    where: dict[str, Path] = {}
    legacy: dict[Path, dict[str, Tensor]] = {}
    for path in files:
        if path.suffix == ".bin":
            legacy[path] = _map_bin(path)
            found = {name: _info(tensor) for name, tensor in legacy[path].items()}
        else:
            found = read_header(path).tensors
        infos.update(found)
        where.update(dict.fromkeys(found, path))
    return Weights(infos, where, legacy)


def _weight_files(folder: Path) -> list[Path]:
    for index, single in ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (folder / index).is_file():
            return _indexed(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    return []


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise SourceError(f"{index} is no valid index of shards.", "Fetch it again.") from error
    files = [index.parent / name for name in sorted(names)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}.",
            "Fetch the model again.",
        )
    return files


def _map_bin(path: Path) -> dict[str, Tensor]:
    """Map a pickled state dict into memory; ``weights_only`` refuses any code in it."""
    import pickle

    import torch

    try:
        state: dict[str, Tensor] = torch.load(path, "cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise SourceError(
            f"Cannot read {path}: {str(error).splitlines()[0]}",
            "Fetch it again, or convert the model to safetensors.",
        ) from error
    return state


def _info(tensor: Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
