"""Apply a plan: factor every planned sublayer, block by block, into a checkpoint folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.artifact import building
from hisvd_cli.calibrate import Calibration
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
from hisvd_cli.errors import NumericalError, StaleArtifactError
from hisvd_cli.model_card import write_card
from hisvd_cli.moments import Moment
from hisvd_cli.paths import digest
from hisvd_cli.plan import Plan
from hisvd_cli.reporter import Reporter
from hisvd_cli.skeleton import build_meta_model, decoder_blocks, tensor_names
from hisvd_cli.source import Source, read_config
from hisvd_cli.tensorfile import join_files, write_json, write_tensors
from hisvd_cli.versions import versions

_OUTSIDE = "outside"


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
            of the matrix it comes from. Parts are written, and resumed, one by one.
        sizes: part → bytes.
    """

    architecture: str
    parts: dict[str, dict[str, str]]
    sizes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())


def lay_out(source: Source, ranks: Mapping[str, int]) -> Layout:
    """Work out, before any work, every tensor of the checkpoint and its size."""
    model = build_meta_model(source)
    prefix, layers = decoder_blocks(model)
    parts: dict[str, dict[str, str]] = {_OUTSIDE: {}}
    parts.update({f"block-{i:05d}": {} for i in range(len(layers))})
    sizes = dict.fromkeys(parts, 0)
    for name, stored in tensor_names(model, source).items():
        part = _OUTSIDE
        if name.startswith(f"{prefix}."):
            index = int(name[len(prefix) + 1 :].partition(".")[0])
            part = f"block-{index:05d}"
        info = source.weights.infos[stored]
        rank = ranks.get(name.removesuffix(".weight"))
        parts[part][name] = stored
        if rank is None:
            sizes[part] += info.nbytes
        else:
            m, n = info.shape
            parts[part][f"{name}_u"] = stored
            sizes[part] += info.nbytes * rank * (m + n) // (m * n)
    return Layout(type(model).__name__, parts, sizes)


def compress(
    source: Source,
    plan: Plan,
    calibration: Calibration | None,
    output: Path,
    *,
    decomposer: str,
    device: torch.device,
    shard_bytes: int,
    settings: Mapping[str, object],
    reporter: Reporter,
) -> Compressed:
    """Write the compressed model to the folder ``output``.

    A run that was interrupted goes on after its last finished block; the result is the same to the
    byte.

    Args:
        source: the dense model that the plan was made for.
        plan: the ranks.
        calibration: moments, for decomposers that use them.
        output: the folder; what stands there is replaced once the new one is complete.
        decomposer: name of the method.
        device: where decompositions run.
        shard_bytes: largest size of a weight file.
        settings: the resolved settings, recorded as they are.
        reporter: told of each block.

    Raises:
        StaleArtifactError: the plan was made for another model.
        UsageError: an unknown decomposer.
        SourceError, NumericalError, OutputError: see each.
    """
    check_plan(plan, source)
    layout = lay_out(source, plan.ranks)
    factory = _Factory(source, plan.ranks, calibration, DECOMPOSERS.get(decomposer), device)
    record = _provenance(plan, calibration, decomposer, settings)
    key = digest(json.dumps([record, plan.document()], sort_keys=True), str(shard_bytes))
    started = time.monotonic()
    with building(output, key) as partial:
        groups = shard_names(layout.sizes, shard_bytes)
        shards = {shard_file(i, len(groups)): parts for i, parts in enumerate(groups)}
        missing = [p for f, parts in shards.items() if not (partial / f).is_file() for p in parts]
        with reporter.stage("Compressing blocks", len(missing)) as step:
            for part in missing:
                factory.write(partial / f"{part}.part", part, layout.parts[part])
                step()
        decomposed = time.monotonic()
        _join_shards(partial, shards, layout)
        config = compressed_config(read_config(source.folder), layout.architecture, plan.ranks)
        write_json(partial / "config.json", config)
        write_json(partial / PROVENANCE, record)
        plan.save(partial / PLAN_FILE)
        copy_companions(source.folder, partial)
        write_loader(partial)
        write_card(partial, source, plan, record)
    written = time.monotonic()
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Compressed(output, size, decomposed - started, written - decomposed)


def check_plan(plan: Plan, source: Source) -> None:
    """Raise StaleArtifactError where a plan was made for other weights than those of ``source``."""
    made_for = plan.provenance["model"]
    if made_for["fingerprint"] != source.fingerprint:
        raise StaleArtifactError(
            f"The plan was made for {made_for['name']}, not for the weights of {source.name}.",
            "Plan again for this model.",
        )


def _provenance(
    plan: Plan,
    calibration: Calibration | None,
    decomposer: str,
    settings: Mapping[str, object],
) -> dict[str, Any]:
    return {
        "kind": "checkpoint",
        "format_version": FORMAT_VERSION,
        "model": plan.provenance["model"],
        "decomposer": decomposer,
        "calibration": calibration.manifest if calibration else None,
        **plan.summary(),
        "settings": settings,
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Factory:
    """Writes the tensors of a part: as they are, or as the pair of factors that the plan asks."""

    source: Source
    ranks: Mapping[str, int]
    calibration: Calibration | None
    method: Decomposer
    device: torch.device

    def write(self, path: Path, part: str, names: Mapping[str, str]) -> None:
        """Write a part (name in the checkpoint → name on disk), unless it is there already."""
        if path.is_file():
            return
        moments: dict[str, Moment] = {}
        if self.calibration and part != _OUTSIDE:
            moments = self.calibration.moments(int(part.rpartition("-")[2]), self.device)
        tensors: dict[str, Tensor] = {}
        for name, stored in names.items():
            sublayer = name.removesuffix(".weight")
            if name not in tensors:  # a factor U comes with its V
                weight = self.source.weights.read(stored)
                if name.endswith(".weight") and sublayer in self.ranks:
                    u, v = self._factor(sublayer, weight, moments.get(sublayer))
                    tensors |= {name: v, f"{name}_u": u}
                else:
                    tensors[name] = weight
        write_tensors(path, tensors, {})

    def _factor(
        self, sublayer: str, weight: Tensor, moment: Moment | None
    ) -> tuple[Tensor, Tensor]:
        """Return U and V on the CPU, in the dtype of the weight. Raises NumericalError."""
        u, v = self.method(weight.to(self.device), moment, self.ranks[sublayer])
        u, v = u.to(weight.dtype).cpu(), v.to(weight.dtype).cpu()
        if not bool(u.isfinite().all() and v.isfinite().all()):
            raise NumericalError(
                f"The decomposition of {sublayer} is not finite in {str(weight.dtype)[6:]}.",
                "Check the model with 'hisvd inspect', and calibrate again.",
            )
        return u, v


def _join_shards(partial: Path, shards: Mapping[str, Sequence[str]], layout: Layout) -> None:
    """Join finished parts into weight files, remove the parts, and write the index."""
    for file, parts in shards.items():
        pieces = [partial / f"{part}.part" for part in parts]
        if not (partial / file).is_file():
            join_files(pieces, partial / file, {"format": "pt"})
        for piece in pieces:
            piece.unlink(missing_ok=True)
    names = {
        file: [name for part in parts for name in layout.parts[part]]
        for file, parts in shards.items()
    }
    write_index(partial, names, layout.total_bytes)
