"""Apply a plan: factor every planned sublayer, block by block, into a checkpoint folder."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.ahead import ahead
from hisvd_cli.calibration import Calibration
from hisvd_cli.checkpoint import (
    FORMAT_VERSION,
    PLAN_FILE,
    PROVENANCE,
    compressed_config,
    copy_companions,
    shard_file,
    shard_names,
    write_index,
    write_loader,
)
from hisvd_cli.decompose import DECOMPOSERS, Decomposer
from hisvd_cli.distributed import World, building_together, share_by_cost, world
from hisvd_cli.errors import NumericalError, StaleArtifactError
from hisvd_cli.estimate import decomposition_cost
from hisvd_cli.lowrank import FACTORS, Storage, factor_shapes
from hisvd_cli.model_card import write_card
from hisvd_cli.paths import digest
from hisvd_cli.pivot import pivoted
from hisvd_cli.plan import Plan
from hisvd_cli.registry import accepted
from hisvd_cli.reporter import Reporter
from hisvd_cli.skeleton import build_meta_model, decoder_blocks, tensor_names
from hisvd_cli.source import Source, read_config
from hisvd_cli.statistics import Need, Statistics, missing
from hisvd_cli.tensorfile import join_files, write_json, write_tensors
from hisvd_cli.truncation import decomposing
from hisvd_cli.versions import versions

_OUTSIDE = "outside"
_INDEX_BYTES = 4


@dataclass(frozen=True)
class Compressed:
    """A finished checkpoint: where, how large, and how long each part took (seconds)."""

    output: Path
    bytes: int
    decompose_seconds: float
    write_seconds: float


@dataclass(frozen=True)
class Layout:
    """Which tensors the checkpoint holds, and in which part each is written.

    Attributes:
        architecture: class name of the model.
        parts: part → name in the checkpoint → name on disk of the source, for a factor the name
            of the matrix it comes from. Parts are written, and resumed, one by one: what is in no
            block; of each block what stays as it is; and each of its factored sublayers.
        sizes: part → bytes.
        costs: part → what factoring it costs, 0 for what stays as it is.
    """

    architecture: str
    parts: dict[str, dict[str, str]]
    sizes: dict[str, int]
    costs: dict[str, int]

    def shared(self, left: Sequence[str], here: World) -> list[str]:
        """Return which of the parts that are left this process makes."""
        blocks: dict[str, list[tuple[str, int]]] = {}
        for part in left:
            blocks.setdefault(_block_of(part), []).append((part, self.costs[part]))
        owner = share_by_cost(list(blocks.values()), here.size)
        return [part for part in left if owner[part] == here.rank]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())


def lay_out(source: Source, ranks: Mapping[str, int], storage: Storage) -> Layout:
    """Work out, before any work, every tensor of the checkpoint and its size."""
    model = build_meta_model(source)
    prefix, layers = decoder_blocks(model)
    groups: dict[str, dict[str, dict[str, str]]] = {_OUTSIDE: {_OUTSIDE: {}}}
    groups |= {block: {block: {}} for block in (f"block-{i:05d}" for i in range(len(layers)))}
    sizes: dict[str, int] = defaultdict(int)
    costs: dict[str, int] = defaultdict(int)
    for name, stored in tensor_names(model, source).items():
        block, local = _OUTSIDE, ""
        if name.startswith(f"{prefix}."):
            index, _, local = name[len(prefix) + 1 :].partition(".")
            block = f"block-{int(index):05d}"
        info = source.weights.infos[stored]
        rank = ranks.get(name.removesuffix(".weight"))
        if rank is None:
            groups[block][block][name] = stored
            sizes[block] += info.nbytes
            continue
        part = f"{block}.{local.removesuffix('.weight')}"
        names = groups[block].setdefault(part, {})
        m, n = info.shape
        costs[part] = decomposition_cost((m, n))
        for leaf, shape in factor_shapes(storage, m, n, rank).items():
            names[f"{name.removesuffix('weight')}{leaf}"] = stored
            width = _INDEX_BYTES if leaf == "weight_order" else info.nbytes // (m * n)
            sizes[part] += prod(shape) * width
    parts = {part: names for group in groups.values() for part, names in group.items()}
    return Layout(
        type(model).__name__,
        parts,
        {part: sizes[part] for part in parts},
        {part: costs[part] for part in parts},
    )


def compress(
    source: Source,
    plan: Plan,
    calibration: Calibration | None,
    output: Path,
    *,
    decomposer: str,
    knobs: Mapping[str, Any],
    needs: Collection[Need],
    device: torch.device,
    shard_bytes: int,
    settings: Mapping[str, object],
    reporter: Reporter,
    history: Mapping[str, Any] | None = None,
) -> Compressed:
    """Write the compressed model to the folder ``output``.

    A run that was interrupted goes on after its last finished sublayers; the result is the same to
    the byte. Several processes share the sublayers, and write the factors of theirs.

    Args:
        source: the dense model that the plan was made for. Of one with corrected weights, what
            stays dense is that of the original.
        plan: the ranks.
        calibration: statistics, for decomposers that use them.
        output: the folder; what stands there is replaced once the new one is complete.
        decomposer: name of the method.
        knobs: its settings; those that it does not name are left out.
        needs: what it needs of a calibration.
        device: where decompositions run.
        shard_bytes: largest size of a weight file.
        settings: the resolved settings, recorded as they are.
        reporter: told of each sublayer.
        history: what the provenance says beside, or instead of, what is known here.

    Raises:
        StaleArtifactError: the plan was made for another model.
        UsageError: an unknown decomposer.
        SourceError: the method needs statistics that were not taken, or a file is damaged.
        NumericalError, OutputError: see each.
    """
    check_plan(plan, source)
    for need in needs:
        if calibration is None or need not in calibration.holds:
            raise missing(decomposer, need)
    layout = lay_out(source, plan.ranks, plan.storage)
    method = DECOMPOSERS.get(decomposer)
    prepared = partial(method, **accepted(method, knobs))
    factory = _Factory(source, layout, plan, calibration, prepared, needs, device)
    record = {**_provenance(plan, calibration, decomposer, needs, settings), **(history or {})}
    key = digest(json.dumps([record, plan.document()], sort_keys=True), str(shard_bytes))
    started = time.monotonic()
    here = world()
    with building_together(output, key) as home:
        groups = shard_names(layout.sizes, shard_bytes)
        shards = {shard_file(i, len(groups)): parts for i, parts in enumerate(groups)}
        left = here.agreed(lambda: _left(home, shards))
        mine = layout.shared(left, here)
        with reporter.stage("Compressing layers", len(mine)) as step:
            for part, material in ahead(factory.gather, mine):
                write_tensors(home / f"{part}.part", factory.made(part, material), {})
                step()
        here.wait()
        decomposed = time.monotonic()
        if here.first:
            _join_shards(home, shards, layout)
            _complete(home, source, plan, layout, record)
    written = time.monotonic()
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Compressed(output, size, decomposed - started, written - decomposed)


def _block_of(part: str) -> str:
    return part.partition(".")[0]


def _left(home: Path, shards: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the parts (of shard → parts) that no run has written yet."""
    return [
        part
        for file, parts in shards.items()
        if not (home / file).is_file()
        for part in parts
        if not (home / f"{part}.part").is_file()
    ]


def _complete(
    home: Path, source: Source, plan: Plan, layout: Layout, record: Mapping[str, Any]
) -> None:
    """Write all that is no weight."""
    config = compressed_config(
        read_config(source.folder), layout.architecture, plan.ranks, plan.storage
    )
    write_json(home / "config.json", config)
    write_json(home / PROVENANCE, record)
    plan.save(home / PLAN_FILE)
    copy_companions(source.folder, home)
    write_loader(home)
    write_card(home, source, plan, record)


def check_plan(plan: Plan, source: Source) -> None:
    """Raise StaleArtifactError where a plan was made for other weights than those of ``source``."""
    made_for = plan.provenance["model"]
    if made_for["fingerprint"] != source.original.fingerprint:
        raise StaleArtifactError(
            f"The plan was made for {made_for['name']}, not for the weights of {source.name}.",
            "Plan again for this model.",
        )


def _provenance(
    plan: Plan,
    calibration: Calibration | None,
    decomposer: str,
    needs: Collection[Need],
    settings: Mapping[str, object],
) -> dict[str, Any]:
    return {
        "kind": "checkpoint",
        "format_version": FORMAT_VERSION,
        "model": plan.provenance["model"],
        "decomposer": decomposer,
        "calibration": calibration.manifest if calibration else None,
        "gradients": calibration.gradients if calibration and set(needs) - {"moments"} else None,
        **plan.summary(),
        "settings": settings,
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Material:
    """What a part is made from: tensors by their names on disk, and statistics of sublayers."""

    tensors: Mapping[str, Tensor]
    known: Mapping[str, Statistics]


@dataclass(frozen=True)
class _Factory:
    """Makes the tensors of a part: as they are, or as the pair of factors that the plan asks."""

    source: Source
    layout: Layout
    plan: Plan
    calibration: Calibration | None
    method: Decomposer
    needs: Collection[Need]
    device: torch.device

    def gather(self, part: str) -> _Material:
        """Read what a part is made from. Raises SourceError, NumericalError."""
        names = self.layout.parts[part]
        factored = {name.rpartition(".")[0] for name in names} & self.plan.ranks.keys()
        known: Mapping[str, Statistics] = {}
        if self.calibration and factored:
            layer = int(_block_of(part).rpartition("-")[2])
            known = self.calibration.statistics(layer, self.needs, self.device, factored)
        tensors: dict[str, Tensor] = {}
        for name, stored in names.items():
            if stored not in tensors:
                truncated = name.removesuffix(".weight") in self.plan.ranks
                source = self.source if truncated else self.source.original
                tensors[stored] = source.weights.read(stored)
        return _Material(tensors, known)

    def made(self, part: str, material: _Material) -> dict[str, Tensor]:
        """Return the tensors of a part. Raises NumericalError."""
        ranks = self.plan.ranks
        tensors: dict[str, Tensor] = {}
        for name, stored in self.layout.parts[part].items():
            sublayer, weight = name.removesuffix(".weight"), material.tensors[stored]
            if name in tensors:  # all factors come with the first
                continue
            if name.endswith(".weight") and sublayer in ranks:
                statistics = material.known.get(sublayer, Statistics())
                factors = self._factor(sublayer, weight, statistics, ranks[sublayer])
                tensors |= {f"{sublayer}.{leaf}": t for leaf, t in factors.items()}
            else:
                tensors[name] = weight
        return tensors

    def _factor(
        self, sublayer: str, weight: Tensor, statistics: Statistics, rank: int
    ) -> dict[str, Tensor]:
        """Return the factors on the CPU, in the dtype of the weight. Raises NumericalError."""
        with decomposing(sublayer):
            u, v = self.method(weight.to(self.device), statistics, rank)
            factors = pivoted(u, v) if self.plan.storage == "pivoted" else (v, u)
        stored: dict[str, Tensor] = dict(zip(FACTORS[self.plan.storage], factors, strict=True))
        for leaf, tensor in stored.items():
            dtype = weight.dtype if tensor.is_floating_point() else tensor.dtype
            stored[leaf] = tensor.to("cpu", dtype)
            if not bool(stored[leaf].isfinite().all()):
                raise NumericalError(
                    f"The decomposition of {sublayer} is not finite in {str(weight.dtype)[6:]}.",
                    "Check the model with 'hisvd inspect', and calibrate again.",
                )
        return stored


def _join_shards(home: Path, shards: Mapping[str, Sequence[str]], layout: Layout) -> None:
    """Join finished parts into weight files, remove the parts, and write the index."""
    for file, parts in shards.items():
        pieces = [home / f"{part}.part" for part in parts]
        if not (home / file).is_file():
            join_files(pieces, home / file, {"format": "pt"})
        for piece in pieces:
            piece.unlink(missing_ok=True)
    names = {
        file: [name for part in parts for name in layout.parts[part]]
        for file, parts in shards.items()
    }
    write_index(home, names, layout.total_bytes)
