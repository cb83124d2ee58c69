"""Converts checkpoints between folders, single ``.pt`` files and dense models."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.export.model_card import write_dense_card
from hisvd_cli.inspection.pt_files import OWN_TEXTS, PT_FORMAT, PT_VERSION, is_unpacked, load_pt
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hisvd_cli.modeling.checkpoints.checkpoint_config import (
    architecture_of,
    compressed_config,
    dense_config,
    quantization_of,
    write_loader,
)
from hisvd_cli.modeling.checkpoints.folder_record import write_record
from hisvd_cli.modeling.checkpoints.shards import SHARD_BYTES, write_shards
from hisvd_cli.modeling.layers.lowrank import FACTORS, dense_product, is_order
from hisvd_cli.modeling.layers.quantized import MATRICES, SCALE, dequantized, storage_with
from hisvd_cli.modeling.skeleton import build_meta_model
from hisvd_cli.modeling.sources.companions import companions, copy_companions, is_own_file
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import SourceError
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
            ),
        )
        for name, data in document["files"].items():
            if is_unpacked(name):
                (partial / name).write_bytes(data.numpy().tobytes())
        write_loader(partial)
        write_record(partial, document["provenance"])


def to_dense(checkpoint: Checkpoint, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the dense model that is equivalent to a checkpoint: weights are dequantized and factors
    multiplied.

    Products are computed in float32 and rounded to the dtype of the other weights. One shard at a
    time is in memory.

    Raises:
        SourceError: a factor is missing or invalid.
        OutputError: the folder cannot be written.
    """
    checkpoint.refuse_own_code()
    record = checkpoint.provenance  # first: rejects links to other folders
    infos, read = checkpoint.weights.infos, checkpoint.weights.read
    factors = _factor_names(checkpoint)
    inner = {name for names in factors.values() for name in names.values()} - set(factors)
    model = build_meta_model(Source(str(checkpoint.folder), checkpoint.folder), compressed=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dtype: torch.dtype = getattr(torch, checkpoint.weights.dtype)
    sizes = {
        name: prod(shapes[name]) * dtype.itemsize if name in factors else info.nbytes
        for name, info in infos.items()
        if name not in inner
    }

    def make(name: str) -> Tensor:
        if name not in factors:
            return read(name)
        stored = {leaf: read(full) for leaf, full in factors[name].items()}
        if "weight_order" in stored and not is_order(stored["weight_order"]):
            raise SourceError(
                f"{name}_order is not a permutation of rows.", "Compress the model again."
            )
        plain = dequantized(stored, shapes[name][1], checkpoint.group_size)
        weight = dense_product(plain) if "weight_u" in plain else plain["weight"]
        return weight.to(dtype)

    with building(folder, _key("dense", checkpoint, shard_bytes)) as partial:
        write_shards(partial, sizes, make, shard_bytes)
        write_json(partial / "config.json", dense_config(checkpoint.config))
        copy_companions(checkpoint.folder, partial)
        write_dense_card(checkpoint.folder, partial)
        write_record(partial, {**record, "kind": "dense"})


def _factor_names(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return weight name → {tensor → name on disk} for each low-rank or quantized sublayer.

    Raises:
        SourceError: a tensor is missing.
    """
    names: dict[str, dict[str, str]] = {}
    for sublayer in {**checkpoint.ranks, **checkpoint.bits}:
        storage = storage_with(checkpoint.bits.get(sublayer), checkpoint.storage)
        leaves = FACTORS[storage] if sublayer in checkpoint.ranks else ("weight",)
        if sublayer in checkpoint.bits:
            leaves += tuple(leaf + SCALE for leaf in leaves if leaf in MATRICES)
        names[f"{sublayer}.weight"] = {leaf: f"{sublayer}.{leaf}" for leaf in leaves}
    for name in (name for each in names.values() for name in each.values()):
        if name not in checkpoint.weights:
            raise SourceError(f"{checkpoint.folder} lacks {name}.", "Compress the model again.")
    return names


def repack(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Write a checkpoint folder with another shard size. Raises OutputError."""
    checkpoint.refuse_own_code()
    weights, record = checkpoint.weights, checkpoint.provenance
    with building(folder, _key("repack", checkpoint, shard_bytes)) as partial:
        sizes = {name: info.nbytes for name, info in weights.infos.items()}
        write_shards(partial, sizes, weights.read, shard_bytes)
        write_json(partial / "config.json", checkpoint.config)
        for path in _texts(checkpoint.folder):
            shutil.copyfile(path, partial / path.name)
        write_loader(partial)
        write_record(partial, record)


def _key(form: str, checkpoint: Checkpoint, shard_bytes: int) -> str:
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
