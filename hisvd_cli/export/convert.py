"""Converts checkpoints between folders, single ``.pt`` files and dense models."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.inspection.pt_files import OWN_TEXTS, PT_FORMAT, PT_VERSION, is_unpacked, load_pt
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.modeling.checkpoints.checkpoint_config import (
    architecture_of,
    compressed_config,
    quantization_of,
    write_loader,
)
from hisvd_cli.modeling.checkpoints.folder_record import write_record
from hisvd_cli.modeling.checkpoints.shards import SHARD_BYTES, write_shards
from hisvd_cli.modeling.sources.companions import companions, is_own_file
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.atomic import replacing
from hisvd_cli.utils.files.fingerprints import digest, file_digest
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.tensorfile import serializing


def to_pt(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint as one file for ``torch.load(path, weights_only=True)``.

    Tensors are mapped from the shards, not copied to memory. Raises OutputError.
    """
    checkpoint.refuse_own_code()
    path = path.resolve()  # keeps a symbolic link in place
    document = {
        "format": PT_FORMAT,
        "format_version": PT_VERSION,
        "config": checkpoint.config,
        "provenance": checkpoint.provenance,
        "tensors": {name: checkpoint.weights.read(name) for name in checkpoint.weights},
        "files": {p.name: _as_tensor(p.read_bytes()) for p in _texts(checkpoint.folder)},
    }
    with replacing(path) as temporary, serializing(path), temporary.open("wb") as file:
        torch.save(document, file)  # a path would store the temporary name in the archive


def _texts(folder: Path) -> list[Path]:
    return companions(folder) + [folder / name for name in OWN_TEXTS if is_own_file(folder / name)]


def _as_tensor(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def from_pt(path: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a ``.pt`` file of hisvd as a Hugging Face folder. Raises SourceError, OutputError."""
    document = load_pt(path)
    tensors: dict[str, Tensor] = document["tensors"]
    known = quantization_of(document["config"], path)
    architecture = architecture_of(document["config"], path)
    with building(folder, digest("from-pt", file_digest(path), str(shard_bytes))) as partial:
        sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        write_shards(partial, sizes, tensors.__getitem__, shard_bytes)
        write_json(
            partial / "config.json",
            compressed_config(
                document["config"],
                architecture,
                known.ranks,
                known.storage,
                bits=known.bits,
                group_size=known.group_size,
                experts=known.experts,
            ),
        )
        for name, data in document["files"].items():
            if is_unpacked(name):
                (partial / name).write_bytes(data.numpy().tobytes())
        write_loader(partial)
        write_record(partial, document["provenance"])


def repack(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Write a checkpoint folder with another shard size. Raises OutputError."""
    checkpoint.refuse_own_code()
    weights, record = checkpoint.weights, checkpoint.provenance
    with building(folder, conversion_key("repack", checkpoint, shard_bytes)) as partial:
        sizes = {name: info.nbytes for name, info in weights.infos.items()}
        write_shards(partial, sizes, weights.read, shard_bytes)
        write_json(partial / "config.json", checkpoint.config)
        for path in _texts(checkpoint.folder):
            shutil.copyfile(path, partial / path.name)
        write_loader(partial)
        write_record(partial, record)


def conversion_key(form: str, checkpoint: Checkpoint, shard_bytes: int) -> str:
    """Return the hash of everything that the converted shards depend on."""
    source = Source(str(checkpoint.folder), checkpoint.folder)
    return digest(form, source.fingerprint, str(shard_bytes))


def unpacked(path: Path, scratch: Path) -> Path:
    """Return the folder of a checkpoint; a ``.pt`` file is unpacked into ``scratch``."""
    if path.is_dir():
        open_checkpoint(path)
        return path
    from_pt(path, scratch)
    return scratch
