"""Blocks × moments ─► ``calibration/``: one walk over the model, resumable after each block."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hisvd_cli.artifact import building
from hisvd_cli.blocks import BlockWalk, overflow_hint
from hisvd_cli.collector import Collector
from hisvd_cli.errors import (
    NumericalError,
    SourceError,
    StaleArtifactError,
    UnsupportedModelError,
)
from hisvd_cli.moments import Moment, Side
from hisvd_cli.paths import digest
from hisvd_cli.reporter import Reporter
from hisvd_cli.source import Source
from hisvd_cli.sublayers import Sublayer, find_sublayers
from hisvd_cli.tensorfile import read_tensors, write_json, write_tensors
from hisvd_cli.versions import versions

MANIFEST = "calibration.json"
FORMAT_VERSION = 1
STATE_SECONDS = 60.0
"""Hidden states are stored at most this often: a rerun repeats at most so much, and a large model's
states (gigabytes) are not written after every block."""
_STATE = "hidden.safetensors"


@dataclass(frozen=True)
class Sample:
    """Calibration tokens and where they came from."""

    tokens: Tensor  # [S, L]
    dataset: str
    split: str
    text_digest: str
    seed: int

    @property
    def key(self) -> str:
        """sha256 of the token windows themselves."""
        return digest(str(list(self.tokens.shape)), self.tokens.numpy().tobytes())


@dataclass(frozen=True)
class Calibration:
    """Second moments on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of what the moments depend on: model, tokens, dtype."""
        return str(self.manifest["key"])

    def moments(self, layer: int, device: torch.device | str = "cpu") -> dict[str, Moment]:
        """Read the moments of one block: sublayer name → moment (shared inputs are one object).

        Args:
            layer: the block.
            device: where they go.

        Raises:
            SourceError: the block's file is missing or damaged.
        """
        path = self.folder / block_file(layer)
        tensors, metadata = read_tensors(path, "Calibrate again.")
        try:
            owners: dict[str, str] = json.loads(metadata["moments"])
            shared = {key: Moment(t.to(device), _side(key)) for key, t in tensors.items()}
            return {name: shared[key] for name, key in owners.items()}
        except (KeyError, ValueError, AttributeError) as error:
            raise SourceError(f"{path} holds no moments.", "Calibrate again.") from error


def _side(key: str) -> Side:
    return "output" if key.endswith(".output") else "input"


def block_file(layer: int) -> str:
    """Return the name of a block's file."""
    return f"block-{layer:05d}.safetensors"


def calibration_key(source: Source, sample: Sample, dtype: torch.dtype) -> str:
    """Return the hash of everything that moments depend on."""
    return digest(str(FORMAT_VERSION), source.fingerprint, sample.key, str(dtype))


def open_calibration(folder: Path, source: Source | None = None) -> Calibration:
    """Open a calibration folder.

    Raises:
        SourceError: no calibration there, or a damaged one.
        StaleArtifactError: it was made for another model than ``source``, or in another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        made_for, fingerprint = manifest["model"]["name"], manifest["model"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{folder} holds no calibration (no readable {MANIFEST}).", "Run: hisvd calibrate"
        ) from error
    if version != FORMAT_VERSION:
        raise StaleArtifactError(
            f"{folder} was calibrated by another version of hisvd (format {version}, here "
            f"{FORMAT_VERSION}).",
            "Calibrate again.",
        )
    if source is not None and fingerprint != source.fingerprint:
        raise StaleArtifactError(
            f"{folder} was calibrated for {made_for}, not for the weights of {source.name}.",
            "Calibrate this model, or name the calibration that was made for it.",
        )
    return Calibration(folder, manifest)


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
    state_seconds: float = STATE_SECONDS,
) -> Calibration:
    """Accumulate the second moments of every sublayer, block by block.

    A run that was interrupted goes on after its last finished block; the result is the same to the
    byte.

    Args:
        source: the model.
        sample: calibration tokens.
        folder: where the calibration goes; built beside it and renamed when complete.
        device: where blocks run and moments are accumulated.
        dtype: in which blocks run; moments are accumulated in float32 products, float64 sums.
        batch: sequences per forward pass.
        settings: the resolved settings, recorded as they are.
        reporter: told of each block.
        state_seconds: how often hidden states are stored for a resumed run.

    Raises:
        SourceError, UnsupportedModelError, NumericalError, OutputError: see each.
    """
    key = calibration_key(source, sample, dtype)
    walk = BlockWalk(source, device, dtype, batch)
    sublayers = find_sublayers(walk.prefix, list(walk.layers))
    with building(folder, key) as partial:
        _walk_blocks(walk, sublayers, sample, partial, state_seconds, reporter)
        (partial / _STATE).unlink(missing_ok=True)
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
            "split": sample.split,
            "text_sha256": sample.text_digest,
            "tokens_sha256": sample.key,
            "samples": samples,
            "seqlen": seqlen,
            "tokens": samples * seqlen,
            "seed": sample.seed,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "settings": settings,
        "versions": versions(),
    }


def _walk_blocks(
    walk: BlockWalk,
    sublayers: Sequence[Sublayer],
    sample: Sample,
    partial: Path,
    state_seconds: float,
    reporter: Reporter,
) -> None:
    count = len(walk.layers)
    done = [i for i in range(count) if (partial / block_file(i)).is_file()]
    first = count if len(done) == count else _resume_state(walk, sample, partial)
    saved = time.monotonic()
    with reporter.stage("Calibrating blocks", count) as step:
        for index in range(count):
            if index >= first:
                walk.load(index)
                if index in done:
                    walk.advance(index)
                else:
                    mine = [s.name for s in sublayers if s.layer == index]
                    _measure_block(walk, index, mine, partial / block_file(index))
                walk.free(index)
                if time.monotonic() - saved >= state_seconds and index + 1 < count:
                    state = {"hidden": walk.hidden}
                    write_tensors(partial / _STATE, state, {"next": str(index + 1)})
                    saved = time.monotonic()
            step()


def _resume_state(walk: BlockWalk, sample: Sample, partial: Path) -> int:
    """Prepare the walk's hidden states; return the block that they are the input of."""
    path = partial / _STATE
    if not path.is_file():
        walk.embed(sample.tokens)
        return 0
    tensors, metadata = read_tensors(path, f"Remove {partial} and run again.")
    walk.embed(sample.tokens, compute_hidden=False)
    walk.hidden = tensors["hidden"].to(walk.device)
    return int(metadata["next"])


def _measure_block(walk: BlockWalk, index: int, names: Sequence[str], path: Path) -> None:
    """Run one block over all sequences and write the moments of its linears ``names``."""
    linears = {name: cast(nn.Linear, walk.model.get_submodule(name)) for name in names}
    collector = Collector(linears, walk.device)
    with collector.grouping():
        walk.probe(index)
    if unseen := [name for name in names if name not in collector.owners]:
        raise UnsupportedModelError(
            f"{unseen[0]} takes no part in the forward pass, so nothing is known of its inputs.",
            "Supported: decoders that run every linear of a block on every token.",
        )
    with collector.summing():
        walk.advance(index)
    moments = {key: total.mean() for key, total in collector.sums.items()}
    for key, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise NumericalError(
                f"The activations of {key.rpartition('.')[0]} are NaN or infinite.",
                overflow_hint(walk.dtype),
            )
    write_tensors(path, moments, {"moments": json.dumps(collector.owners, sort_keys=True)})
