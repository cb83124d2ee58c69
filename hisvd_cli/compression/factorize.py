"""Executes a plan: factors all planned sublayers into a checkpoint folder."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.layout import Layout, lay_out
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.compression.parts import PartBuilder
from hisvd_cli.compression.updating import Update, Updating
from hisvd_cli.linalg.statistics import Need, missing
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.modeling.checkpoints.checkpoint_config import (
    FORMAT_VERSION,
    compressed_config,
    untied,
    write_loader,
)
from hisvd_cli.modeling.checkpoints.folder_record import Describe, write_record
from hisvd_cli.modeling.checkpoints.shards import join_parts, parts_left, shard_file, shard_names
from hisvd_cli.modeling.sources.companions import copy_code, copy_companions, warn_of_links
from hisvd_cli.modeling.sources.source import Source, code_modules
from hisvd_cli.utils.distributed import building_together, world
from hisvd_cli.utils.errors import StaleArtifactError
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.tensorfile import write_tensors
from hisvd_cli.utils.prefetch import ahead
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions

_OUTSIDE = "outside"
_INDEX_BYTES = 4


@dataclass(frozen=True)
class Compressed:
    """A finished checkpoint: its folder, size, seconds of each step, and ``hisvd.json``."""

    output: Path
    bytes: int
    decompose_seconds: float
    write_seconds: float
    record: Mapping[str, Any]


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
    describe: Describe,
    reporter: Reporter,
    update: Update | None = None,
    history: Mapping[str, Any] | None = None,
) -> Compressed:
    """Write the compressed model to the folder ``output``.

    An interrupted run resumes after the last completed sublayers; the result is identical to the
    byte. Several processes share the sublayers.

    Args:
        source: the dense model of the plan. If its weights are corrected, tensors that stay dense
            are those of the original.
        plan: the ranks.
        calibration: statistics, for decomposers that use them.
        output: the folder; an existing one is replaced when the new one is complete.
        decomposer: name of the method.
        knobs: values of its options and of other settings that it may name.
        needs: statistics that it needs.
        device: device of decompositions.
        shard_bytes: maximum size of a weight file.
        settings: the resolved settings, for the provenance.
        describe: writes the model card.
        reporter: shows progress.
        update: fit of weights to their inputs in the compressed model.
        history: entries that are added to the provenance or replace its own.

    Raises:
        StaleArtifactError: the plan was made for another model.
        UsageError: unknown decomposer.
        SourceError: statistics that the method needs are missing, or a file is damaged.
        NumericalError, OutputError: a tensor is not finite, or cannot be written.
    """
    check_plan(plan, source)
    warn_of_links(source.folder, reporter)
    for need in needs:
        if calibration is None or need not in calibration.holds:
            raise missing(decomposer, need)
    layout = lay_out(source, plan.ranks, plan.storage)
    prepared = partial(DECOMPOSERS.get(decomposer), **DECOMPOSERS.arguments(decomposer, knobs))
    builder = PartBuilder(source, layout.parts, plan, calibration, prepared, needs, device)
    record = _provenance(plan, calibration, decomposer, needs, settings, update)
    record |= history or {}
    key = digest(json.dumps([record, plan.document()], sort_keys=True), str(shard_bytes))
    started = time.monotonic()
    here = world()
    with building_together(output, key) as home:
        groups = shard_names(layout.sizes, shard_bytes)
        shards = {shard_file(i, len(groups)): parts for i, parts in enumerate(groups)}
        left = here.agreed(lambda: parts_left(home, shards))
        updated = layout.factored() if update else {}
        mine = layout.shared([part for part in left if part not in updated.values()], here)
        with reporter.stage("Compressing layers", len(mine)) as step:
            for part, inputs in ahead(builder.read, mine):
                write_tensors(home / f"{part}.part", builder.build(part, inputs), {})
                step()
        if update:
            waiting = [part for part in left if part in updated.values()]
            Updating(update, builder, updated, home).run(waiting, reporter)
        here.wait()
        decomposed = time.monotonic()
        if here.first:
            names = {name: part.names(plan.storage) for name, part in layout.parts.items()}
            join_parts(home, shards, names, layout.total_bytes)
            _complete(home, source, plan, layout)
            describe(home, record)
            write_record(home, record)
    written = time.monotonic()
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Compressed(output, size, decomposed - started, written - decomposed, record)


def _complete(home: Path, source: Source, plan: Plan, layout: Layout) -> None:
    """Write all files except weights."""
    plain = untied(source.plain_config) if layout.own_head else source.plain_config
    stacks = {"experts": "separate"} if layout.stacked else {}
    config = compressed_config(plain, layout.architecture, plan.ranks, plan.storage, **stacks)
    if source.carries_code:  # requested, and needed to load the result
        config["auto_map"] = plain["auto_map"]
    write_json(home / "config.json", config)
    plan.save(home / PLAN_FILE)
    copy_companions(source.folder, home)
    if source.carries_code:
        copy_code(source.folder, home, code_modules(plain))
    else:
        write_loader(home)


def check_plan(plan: Plan, source: Source) -> None:
    """Raise StaleArtifactError if a plan was made for other weights than those of ``source``."""
    made_for = plan.provenance["model"]
    if made_for["fingerprint"] != source.original.fingerprint:
        raise StaleArtifactError(
            f"The plan was made for {made_for['name']}, not for the weights of {source.name}.",
            "Make a plan for this model.",
        )


def _provenance(
    plan: Plan,
    calibration: Calibration | None,
    decomposer: str,
    needs: Collection[Need],
    settings: Mapping[str, object],
    update: Update | None,
) -> dict[str, Any]:
    record = {
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
    return {**record, "update": update.record()} if update else record
