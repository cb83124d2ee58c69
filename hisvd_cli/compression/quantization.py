"""Quantizes a checkpoint.

Rounding to nearest needs only the checkpoint. ``gptq`` needs the second moments of all sublayer
inputs, which a calibration does not always contain, and only for the dense model. The compressed
model is therefore run over calibration text, block by block, with earlier blocks already quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.compression.quantized_parts import PartsWriter, Recipe, Text, pair_storage
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, Checkpoint
from hisvd_cli.modeling.checkpoints.checkpoint_config import compressed_config, write_loader
from hisvd_cli.modeling.checkpoints.folder_record import Describe, write_record
from hisvd_cli.modeling.checkpoints.shards import join_parts, parts_left, shard_file, shard_names
from hisvd_cli.modeling.sources.companions import copy_companions, is_own_file, warn_of_links
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions


def sublayers_of(checkpoint: Checkpoint) -> list[Sublayer]:
    """Return all sublayers of a checkpoint, low-rank and dense."""
    source = Source(str(checkpoint.folder), checkpoint.folder)
    prefix, layers = decoder_blocks(build_meta_model(source, compressed=True))
    return find_sublayers(prefix, list(layers))


def quantize(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    text: Text | None,
    *,
    shard_bytes: int,
    settings: Mapping[str, object],
    describe: Describe,
    reporter: Reporter,
) -> int:
    """Write a quantized checkpoint to the folder ``output``; return the bytes of its weights.

    An interrupted run resumes after the last completed block; the result is identical to the byte.

    Args:
        checkpoint: the checkpoint, not quantized.
        output: the folder; an existing one is replaced when the new one is complete.
        recipe: bits and method.
        text: calibration text, for gptq.
        shard_bytes: maximum size of a weight file.
        settings: the resolved settings, for the provenance.
        describe: writes the model card.
        reporter: shows progress.

    Raises:
        SourceError: the checkpoint is already quantized, is damaged, or lacks a sublayer.
        NumericalError: numbers are not finite.
        OutputError: the folder cannot be written.
    """
    checkpoint.refuse_own_code()
    checkpoint.refuse_quantized()
    warn_of_links(checkpoint.folder, reporter)
    recipe = replace(recipe, bits={name: n for name, n in recipe.bits.items() if n != 16})
    source = Source(str(checkpoint.folder), checkpoint.folder)
    work = PartsWriter(source, checkpoint, recipe, text)
    sizes = work.sizes()
    record = _provenance(checkpoint, source, recipe, text, settings)
    record["quantization"] |= {"bytes": sum(sizes.values()), "dense_bytes": work.dense_bytes}
    groups = shard_names(sizes, shard_bytes)
    shards = {shard_file(i, len(groups)): parts for i, parts in enumerate(groups)}
    with building(output, digest(json.dumps(record, sort_keys=True), str(shard_bytes))) as home:
        if left := parts_left(home, shards):
            work.write_parts(home, left, reporter)
        names = {part: list(tensors) for part, tensors in work.stored.items()}
        join_parts(home, shards, names, sum(sizes.values()))
        _complete(home, checkpoint, recipe, record)
        describe(home, record)
        write_record(home, record)
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def _complete(
    home: Path, checkpoint: Checkpoint, recipe: Recipe, record: Mapping[str, Any]
) -> None:
    """Write all files except weights."""
    config, storage = checkpoint.config, record["quantization"]["storage"]
    write_json(
        home / "config.json",
        compressed_config(
            config,
            checkpoint.architecture,
            checkpoint.ranks,
            storage,
            bits=dict(recipe.bits),
            group_size=recipe.group_size,
            experts=checkpoint.experts,
        ),
    )
    if is_own_file(checkpoint.folder / PLAN_FILE):
        load_plan(checkpoint.folder / PLAN_FILE).save(home / PLAN_FILE)
    copy_companions(checkpoint.folder, home)
    write_loader(home)


def _provenance(
    checkpoint: Checkpoint,
    source: Source,
    recipe: Recipe,
    text: Text | None,
    settings: Mapping[str, object],
) -> dict[str, Any]:
    known = {**asdict(recipe), "storage": pair_storage(checkpoint, recipe)}
    if text is not None:
        samples, seqlen = text.sample.tokens.shape
        known["text"] = {
            "dataset": text.sample.dataset,
            "split": text.sample.split,
            "samples": samples,
            "seqlen": seqlen,
            "seed": text.sample.seed,
            "tokens_sha256": text.sample.key,
            "dtype": dtype_name(text.dtype),
        }
    else:
        del known["damping"]
    made_from = {"made_from": source.fingerprint, "settings": settings, "versions": versions()}
    return {**checkpoint.provenance, "quantization": {**known, **made_from}}
