"""Collects activation statistics in one walk over the model, resumable after each block."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hisvd_cli.calibration.block_inputs import INPUTS, BlockInputs
from hisvd_cli.calibration.collector import Collector, TurnSum
from hisvd_cli.calibration.routing import pool_stacks, stacks_among
from hisvd_cli.calibration.statistics_files import block_file
from hisvd_cli.calibration.store import (
    FORMAT_VERSION,
    MANIFEST,
    Calibration,
    Sample,
    calibration_key,
    open_calibration,
)
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.hidden_states import Place, StatesHome
from hisvd_cli.modeling.overflow import overflow_hint
from hisvd_cli.modeling.rows import Checkpoints
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers
from hisvd_cli.utils.distributed import building_together, world
from hisvd_cli.utils.errors import NumericalError, UnsupportedModelError
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.files.tensorfile import write_tensors
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions

STATE_SECONDS = 60.0
"""Interval between writes of hidden states, which are gigabytes for a large model."""
_STATE = "hidden"


def calibrate(
    source: Source,
    sample: Sample,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    settings: Mapping[str, object],
    reporter: Reporter,
    keep_inputs: bool = False,
    state_seconds: float = STATE_SECONDS,
    place: Place = "device",
) -> Calibration:
    """Collect the second moments of every linear layer, block by block.

    Several processes share the sequences. An interrupted run resumes after the last completed
    block, with the same result to the byte.

    Args:
        source: the model.
        sample: calibration tokens.
        folder: the calibration; it is built in a sibling folder and renamed when complete.
        device: where blocks run and moments are accumulated.
        dtype: dtype of the forward passes; moments use float32 products and float64 sums.
        batch: sequences per forward pass.
        settings: the resolved settings, recorded unchanged.
        reporter: receives progress.
        keep_inputs: also keep the input of each block on disk, for a later reverse walk.
        state_seconds: interval between writes of hidden states.
        place: where hidden states are kept.

    Returns:
        The calibration.

    Raises:
        SourceError: weights are missing or damaged.
        UnsupportedModelError: the model cannot be run block by block.
        NumericalError: activations are not finite.
        OutputError: files cannot be written.
    """
    key = calibration_key(source, sample, dtype)
    with building_together(folder, key) as partial:
        walk = BlockWalk(source, device, dtype, batch, StatesHome(device, place, partial))
        sublayers = find_sublayers(walk.prefix, list(walk.layers))
        inputs = BlockInputs(partial / INPUTS) if keep_inputs else None
        _walk_blocks(walk, sublayers, sample, partial, inputs, state_seconds, reporter)
        if world().first:
            write_json(partial / MANIFEST, _manifest(source, sample, key, dtype, settings))
    return open_calibration(folder)


def _manifest(
    source: Source, sample: Sample, key: str, dtype: torch.dtype, settings: Mapping[str, object]
) -> dict[str, object]:
    samples, seqlen = sample.tokens.shape
    return {
        "kind": "calibration",
        "format_version": FORMAT_VERSION,
        "key": key,
        "model": {
            "name": source.name,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
        },
        "data": {
            "dataset": sample.dataset,
            "drop": sample.drop,
            "split": sample.split,
            "text_sha256": sample.text_digest,
            "tokens_sha256": sample.key,
            "samples": samples,
            "seqlen": seqlen,
            "tokens": samples * seqlen,
            "seed": sample.seed,
        },
        "dtype": dtype_name(dtype),
        "settings": settings,
        "versions": versions(),
    }


def _walk_blocks(
    walk: BlockWalk,
    sublayers: Sequence[Sublayer],
    sample: Sample,
    partial: Path,
    inputs: BlockInputs | None,
    state_seconds: float,
    reporter: Reporter,
) -> None:
    count, tokens, here = len(walk.layers), sample.tokens.numel(), world()
    state = Checkpoints(partial, _STATE, len(sample.tokens))
    start = here.share(len(sample.tokens)).start
    done, kept = here.agreed(
        lambda: ([i for i in range(count) if intact(partial / block_file(i))], state.blocks())
    )
    missing = next((i for i in range(count) if i not in done), count)
    kept = [block for block in kept if block <= missing]
    first = count if missing == count else _resume_state(walk, sample, state, kept)
    saved = time.monotonic()
    with reporter.stage("Calibrating blocks", count) as step:
        for index in range(count):
            if index >= first:
                if inputs:
                    inputs.keep(index, start, walk.hidden, walk.home)
                walk.load(index)
                if index in done:
                    walk.advance(index)
                else:
                    _measure_block(walk, index, sublayers, tokens, partial / block_file(index))
                walk.free(index)
                due = time.monotonic() - saved >= state_seconds and index + 1 < count
                if here.agreed(lambda due=due: due):  # type: ignore[misc]
                    keep_state(state, index + 1, walk.hidden, walk.home)
                    saved = time.monotonic()
            step()
    if inputs and first < count:
        inputs.keep(count, start, walk.hidden, walk.home)
    if here.first:
        state.remove()


def keep_state(state: Checkpoints, block: int, rows: Tensor, home: StatesHome) -> None:
    """Write the input of ``block`` for this process's sequences, and remove older states."""
    here = world()
    state.at(block).keep(here.share(state.count).start, rows, home)
    here.wait()
    if here.first:
        state.remove(but=block)


def _resume_state(walk: BlockWalk, sample: Sample, state: Checkpoints, kept: Sequence[int]) -> int:
    """Load the hidden states of the walk; return the block whose input they are.

    Args:
        walk: the model.
        sample: all calibration tokens.
        state: the stored hidden states.
        kept: the blocks whose input is stored.
    """
    rows = world().share(len(sample.tokens))
    mine = sample.tokens[rows.start : rows.stop]
    walk.embed(mine)
    if not kept or walk.carries:
        return 0
    walk.hidden = state.at(kept[-1]).load(rows.start, rows.stop, walk.home)
    return kept[-1]


def _measure_block(
    walk: BlockWalk, index: int, sublayers: Sequence[Sublayer], tokens: int, path: Path
) -> None:
    """Run one block over all sequences, with ``tokens`` tokens in all processes, and write the
    moments of those of the sublayers that are in it."""
    here = world()
    mine = [s for s in sublayers if s.layer == index]
    names = [name for sublayer in mine for name in sublayer.members]
    linears = linears_of(walk, names)
    collector = Collector(linears, walk.device, stacks=stacks_among(mine))

    def probe() -> list[list[str]]:
        with collector.grouping() as groups:
            walk.probe(index)
        return groups

    collector.choose_sides(here.agreed(probe))
    if unseen := [name for name in names if name not in collector.owners]:
        raise UnsupportedModelError(
            f"{unseen[0]} is not used in the forward pass, so it has no activation statistics.",
            "Supported: decoders that run every linear layer of a block on every token.",
        )
    turn = TurnSum()
    with collector.summing(), turn.watching(walk.layers[index]):
        walk.advance(index)
    collector.pool(here.add_up)
    turn.pool(here.add_up)
    if here.first:
        collector.count_experts(tokens)
        _write_block(collector, turn, walk.dtype, path)


def _write_block(collector: Collector, turn: TurnSum, dtype: torch.dtype, path: Path) -> None:
    # Each sum is freed before the next mean is computed.
    means = {key: collector.sums.pop(key).mean() for key in list(collector.sums)}
    hits = {name: each.tokens for name, each in collector.hits.items()}
    pool_stacks(means, collector.stacks, hits, "input")
    for key, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise NumericalError(
                f"The activations of {key.rpartition('.')[0]} are NaN or infinite.",
                overflow_hint(dtype),
            )
    known = {"owners": collector.owners, "importance": turn.mean()}
    if hits:
        known["hits"] = {n: [hits[m] for m in each] for n, each in collector.stacks.items()}
    # A single metadata entry, since safetensors writes several in random order.
    write_tensors(path, means, {"block": json.dumps(known, sort_keys=True)})


def linears_of(walk: BlockWalk, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Return linear layers of a walk's model by name."""
    return {name: cast(nn.Linear, walk.model.get_submodule(name)) for name in names}
