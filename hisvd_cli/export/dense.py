"""Writes the dense model that is equivalent to a checkpoint, in the layout of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hisvd_cli.export.model_card import write_dense_card
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.checkpoints.checkpoint_config import dense_config
from hisvd_cli.modeling.checkpoints.folder_record import write_record
from hisvd_cli.modeling.checkpoints.shards import SHARD_BYTES, write_shards
from hisvd_cli.modeling.layers.experts import ExpertStack
from hisvd_cli.modeling.layers.lowrank import FACTORS, dense_product, is_order
from hisvd_cli.modeling.layers.quantized import MATRICES, SCALE, dequantized, storage_with
from hisvd_cli.modeling.layers.replacement import find_dense, sizes_of
from hisvd_cli.modeling.sources.companions import copy_companions
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.conversion import note_rules, original_groups, original_tensors
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.json_files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_dense(
    checkpoint: Checkpoint, folder: Path, key: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the dense model: weights are dequantized and factors multiplied.

    Products are computed in float32 and rounded to the dtype of the other weights. Tensors have the
    names and shapes of the original model's files. One shard at a time is in memory.

    Args:
        checkpoint: the checkpoint.
        folder: the output.
        key: hash of everything that the shards depend on.
        shard_bytes: maximum size of a weight file.

    Raises:
        SourceError: a factor is missing or invalid.
        OutputError: the folder cannot be written.
    """
    checkpoint.refuse_own_code()
    record = checkpoint.provenance  # first: rejects links to other folders
    source = Source(str(checkpoint.folder), checkpoint.folder)
    model = build_meta_model(source, compressed=True, working=False)
    dense = _Dense(checkpoint, model)
    note_rules(model, *dense.names())
    with building(folder, key) as partial_folder:
        write_shards(partial_folder, dense.sizes(), dense.make, shard_bytes)
        write_json(partial_folder / "config.json", dense_config(checkpoint.config))
        copy_companions(checkpoint.folder, partial_folder)
        write_dense_card(checkpoint.folder, partial_folder)
        write_record(partial_folder, {**record, "kind": "dense"})


@dataclass
class _Dense:
    """The tensors of the dense model, by their names in its files."""

    checkpoint: Checkpoint
    model: PreTrainedModel

    def names(self) -> tuple[list[str], list[str]]:
        """Return names on disk of unchanged tensors, and names in the model of replaced ones."""
        made = [name for name, stored in self._stored.items() if stored in self._replaced]
        return [name for name in self._stored if name not in set(made)], made

    @cached_property
    def _replaced(self) -> frozenset[str]:
        """The low-rank and quantized sublayers."""
        return frozenset({**self.checkpoint.ranks, **self.checkpoint.bits})

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Name in the model → name on disk for unchanged tensors, and → sublayer for replaced."""
        inner = {name for s in self._replaced for name in self._leaves(s).values()}
        found = {name: name for name in self.checkpoint.weights if name not in inner}
        for sublayer in {**self.checkpoint.ranks, **self.checkpoint.bits}:
            linear = not isinstance(find_dense(self.model, sublayer), ExpertStack)
            found[f"{sublayer}.weight" if linear else sublayer] = sublayer
        return found

    @cached_property
    def _groups(self) -> dict[str, tuple[str, ...]]:
        """Name in a file of the original → names that it is made from, where rules change it."""
        found: dict[str, tuple[str, ...]] = {}
        own = self.model.state_dict()
        named = [name for name, stored in self._stored.items() if name in own or stored in own]
        groups = original_groups(self.model, named)
        grouped = {name for group in groups for name in group}
        groups += [
            (n,) for n, s in self._stored.items() if s in self._replaced and n not in grouped
        ]
        for names in groups:
            made = list(self._originals(names))
            if made != list(names):
                found |= dict.fromkeys(made, names)
        return found

    def _originals(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors of the original's files that a group becomes, without data."""
        given = {name: torch.empty(self._shape(name), device="meta") for name in names}
        return original_tensors(self.model, given)

    def sizes(self) -> dict[str, int]:
        """Return name → bytes of all tensors, in the order of the checkpoint."""
        width = self._dtype.itemsize
        made: dict[str, int] = {}
        grouped = {name for names in self._groups.values() for name in names}
        for name, stored in self._stored.items():
            if name in grouped:
                continue
            info = self.checkpoint.weights.infos.get(stored)
            made[name] = info.nbytes if info else prod(self._shape(name)) * width
        for names in dict.fromkeys(self._groups.values()):
            changed = self._originals(names)
            made |= {name: tensor.numel() * width for name, tensor in changed.items()}
        return made

    def make(self, name: str) -> Tensor:
        """Return a tensor of the dense model. Raises SourceError."""
        if name not in self._groups:
            return self._tensor(name)
        names = self._groups[name]
        if self._last[0] != names:
            tensors = {each: self._tensor(each) for each in names}
            self._last = (names, original_tensors(self.model, tensors))
        return self._last[1][name]

    _last: tuple[tuple[str, ...], Mapping[str, Tensor]] = ((), MappingProxyType({}))

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.checkpoint.weights.dtype)
        return dtype

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the form of transformers."""
        stored = self._stored[name]
        if stored not in self._replaced:
            return self.checkpoint.weights.infos[stored].shape
        dense = find_dense(self.model, stored)
        if isinstance(dense, ExpertStack):
            return tuple(dense.parameter.shape)
        if dense is None:
            raise SourceError(
                f"{stored} has a rank in config.json, but is no layer of the model.",
                "Compress the model again.",
            )
        return tuple(dense.weight.shape)

    def _tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        if stored not in self._replaced:
            return self.checkpoint.weights.read(stored)
        dense = find_dense(self.model, stored)
        weight = self._multiplied(stored)
        turned = dense.transposed if isinstance(dense, ExpertStack) else isinstance(dense, Conv1D)
        weight = weight.mT.contiguous() if turned else weight
        return weight.to(self._dtype)

    def _multiplied(self, sublayer: str) -> Tensor:
        """Return the weight ``[m, n]`` of a sublayer, or ``[E, m, n]`` of a stack."""
        read = self.checkpoint.weights.read
        stored = {leaf: read(full) for leaf, full in self._leaves(sublayer).items()}
        if "weight_order" in stored and not is_order(stored["weight_order"]):
            raise SourceError(
                f"{sublayer}.weight_order is not a permutation of rows.",
                "Compress the model again.",
            )
        if isinstance(found := find_dense(self.model, sublayer), ExpertStack):
            return dense_product(stored).expand(found.sizes)
        columns = sizes_of(found)[1] if found is not None else 0
        plain = dequantized(stored, columns, self.checkpoint.group_size)
        return dense_product(plain) if "weight_u" in plain else plain["weight"]

    def _leaves(self, sublayer: str) -> dict[str, str]:
        """Return leaf → name on disk of the tensors of a replaced sublayer. Raises SourceError."""
        checkpoint = self.checkpoint
        storage = storage_with(checkpoint.bits.get(sublayer), checkpoint.storage)
        if isinstance(find_dense(self.model, sublayer), ExpertStack):
            storage = "pair"
        leaves = FACTORS[storage] if sublayer in checkpoint.ranks else ("weight",)
        if sublayer in checkpoint.bits:
            leaves += tuple(leaf + SCALE for leaf in leaves if leaf in MATRICES)
        names = {leaf: f"{sublayer}.{leaf}" for leaf in leaves}
        if missing := [name for name in names.values() if name not in checkpoint.weights]:
            raise SourceError(
                f"{checkpoint.folder} lacks {missing[0]}.", "Compress the model again."
            )
        return names
