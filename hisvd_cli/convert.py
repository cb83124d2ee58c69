"""A checkpoint in another form: a Hugging Face folder, one ``.pt`` file, or a dense model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.artifact import building
from hisvd_cli.checkpoint import (
    PLAN_FILE,
    PROVENANCE,
    SHARD_BYTES,
    Checkpoint,
    companions,
    compressed_config,
    copy_companions,
    dense_config,
    open_checkpoint,
    storage_of,
    write_loader,
    write_shards,
)
from hisvd_cli.errors import SourceError
from hisvd_cli.lowrank import FACTORS, dense_product, is_order
from hisvd_cli.model_card import write_dense_card
from hisvd_cli.paths import digest
from hisvd_cli.tensorfile import replacing, write_json

PT_FORMAT = "hisvd-pt"
PT_VERSION = 1
"""A ``.pt`` file is a dict of plain types and tensors: format, format_version, config, provenance,
tensors (name → tensor) and files (name → bytes as a uint8 tensor)."""


def to_pt(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint as one file that ``torch.load(path, weights_only=True)`` reads.

    Tensors are mapped from the shards, not copied into memory first. Raises OutputError.
    """
    document = {
        "format": PT_FORMAT,
        "format_version": PT_VERSION,
        "config": checkpoint.config,
        "provenance": checkpoint.provenance,
        "tensors": {name: checkpoint.weights.read(name) for name in checkpoint.weights},
        "files": {p.name: _as_tensor(p.read_bytes()) for p in _texts(checkpoint.folder)},
    }
    with replacing(path) as temporary:
        torch.save(document, temporary)


def _texts(folder: Path) -> list[Path]:
    own = [folder / name for name in ("README.md", PLAN_FILE)]
    return companions(folder) + [path for path in own if path.is_file()]


def _as_tensor(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def is_own_pt(document: object) -> bool:
    """Tell whether what ``torch.load`` gave is a file of ours."""
    return isinstance(document, dict) and document.get("format") == PT_FORMAT


def load_pt(path: Path) -> dict[str, Any]:
    """Read one of our ``.pt`` files, its tensors mapped from the file.

    Raises:
        SourceError: another kind of file, or a damaged one.
    """
    import pickle

    try:
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise SourceError(
            f"{path} is no .pt file of hisvd, or it is damaged.",
            f"Look at it safely with: hisvd inspect {path}",
        ) from error
    if not is_own_pt(document) or document["format_version"] != PT_VERSION:
        raise SourceError(
            f"{path} is no .pt file of this version of hisvd.",
            f"Look at it safely with: hisvd inspect {path}",
        )
    loaded: dict[str, Any] = document
    return loaded


def from_pt(path: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one of our ``.pt`` files as a Hugging Face folder. Raises SourceError, OutputError."""
    document = load_pt(path)
    tensors: dict[str, Tensor] = document["tensors"]
    with building(folder, digest("from-pt", str(path.stat().st_mtime_ns))) as partial:
        sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        write_shards(partial, sizes, iter(tensors.items()), shard_bytes)
        config = document["config"]
        quantization = config["quantization_config"]
        write_json(
            partial / "config.json",
            compressed_config(
                config,
                config["architectures"][0],
                quantization["ranks"],
                storage_of(quantization),
            ),
        )
        write_json(partial / PROVENANCE, document["provenance"])
        for name, data in document["files"].items():
            # A name from a file must not lead out of the folder.
            (partial / Path(name).name).write_bytes(data.numpy().tobytes())
        write_loader(partial)


def to_dense(checkpoint: Checkpoint, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the plain dense model that equals a checkpoint: every pair multiplied out.

    Products are taken in float32 and rounded to the factors' dtype. One shard is in memory.

    Raises:
        SourceError: a factor is missing, or is no such thing.
        OutputError: the folder cannot be written.
    """
    infos = checkpoint.weights.infos
    factors = _factor_names(checkpoint)
    sizes: dict[str, int] = {}
    inner = {name for names in factors.values() for name in names.values()} - set(factors)
    for name, info in infos.items():
        if name in factors:
            rows = infos[factors[name]["weight_u"]].shape[0]
            rows += info.shape[0] if checkpoint.storage == "pivoted" else 0
            sizes[name] = info.nbytes // info.shape[0] * rows
        elif name not in inner:
            sizes[name] = info.nbytes

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sizes:
            tensor = checkpoint.weights.read(name)
            if name in factors:
                read = {leaf: checkpoint.weights.read(n) for leaf, n in factors[name].items()}
                if "weight_order" in read and not is_order(read["weight_order"]):
                    raise SourceError(f"{name}_order is no order of rows.", "Compress again.")
                tensor = dense_product(read).to(tensor.dtype)
            yield name, tensor

    with building(folder, digest("dense", json.dumps(checkpoint.config))) as partial:
        write_shards(partial, sizes, tensors(), shard_bytes)
        write_json(partial / "config.json", dense_config(checkpoint.config))
        write_json(partial / PROVENANCE, {**checkpoint.provenance, "kind": "dense"})
        copy_companions(checkpoint.folder, partial)
        write_dense_card(checkpoint.folder, partial)


def _factor_names(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return, for the weight of each low-rank sublayer, the names of its factors on disk.

    Raises:
        SourceError: a factor is missing.
    """
    names = {
        f"{sublayer}.weight": {leaf: f"{sublayer}.{leaf}" for leaf in FACTORS[checkpoint.storage]}
        for sublayer in checkpoint.ranks
    }
    for name in (name for each in names.values() for name in each.values()):
        if name not in checkpoint.weights:
            raise SourceError(f"{checkpoint.folder} lacks {name}.", "Compress again.")
    return names


def repack(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Write a checkpoint folder again, with shards of another size. Raises OutputError."""
    weights = checkpoint.weights
    with building(folder, digest("repack", json.dumps(checkpoint.config))) as partial:
        sizes = {name: info.nbytes for name, info in weights.infos.items()}
        tensors = ((name, weights.read(name)) for name in sizes)
        write_shards(partial, sizes, tensors, shard_bytes)
        write_json(partial / "config.json", checkpoint.config)
        write_json(partial / PROVENANCE, checkpoint.provenance)
        for path in _texts(checkpoint.folder):
            shutil.copyfile(path, partial / path.name)
        write_loader(partial)


def unpacked(path: Path, scratch: Path) -> Path:
    """Return a folder for a checkpoint that may be one ``.pt`` file (unpacked into ``scratch``)."""
    if path.is_dir():
        open_checkpoint(path)
        return path
    from_pt(path, scratch)
    return scratch
