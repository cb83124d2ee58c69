"""Fine-tunes the low-rank factors of a checkpoint; ranks, storage and dtypes do not change."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.finetuning.factor_training import Factors
from hisvd_cli.finetuning.trained_pairs import stored_factors
from hisvd_cli.finetuning.trainer import Progress
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, Checkpoint
from hisvd_cli.modeling.checkpoints.checkpoint_config import write_loader
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE, Describe, write_record
from hisvd_cli.modeling.checkpoints.shards import write_shards
from hisvd_cli.modeling.layers.lowrank import FACTORS
from hisvd_cli.modeling.sources.companions import copy_companions, is_own_file
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import NumericalError, SourceError
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.versions import versions

WORK = "training"
"""Subfolder of the output under construction from which an interrupted training resumes."""


@dataclass(frozen=True)
class Recovered:
    """A finished recovery: output, size in bytes, progress of the training, duration in seconds."""

    output: Path
    bytes: int
    progress: Progress
    seconds: float


Train = Callable[[Path], tuple[Factors, Progress]]
"""Trains in a work folder; returns the factors and the progress."""


def recover(
    checkpoint: Checkpoint,
    train: Train,
    output: Path,
    *,
    record: Mapping[str, Any],
    shard_bytes: int,
    describe: Describe,
) -> Recovered:
    """Train the factors of a checkpoint and write the result.

    An interrupted run resumes from the last stored state of its training.

    Args:
        checkpoint: the checkpoint.
        train: returns the trained factors.
        output: output folder; an existing one is replaced once the new one is complete.
        record: everything that the result depends on, including the fingerprint of the checkpoint;
            recorded unchanged.
        shard_bytes: maximum size of a weight file.
        describe: writes the model card.

    Returns:
        The finished recovery.

    Raises:
        NumericalError: a trained factor overflows in the dtype on disk.
        OutputError, SourceError: files cannot be written or read.
    """
    checkpoint.refuse_own_code()
    started = time.monotonic()
    about = json.dumps([record, checkpoint.provenance], sort_keys=True)
    key = digest(about, str(shard_bytes))
    progress = Progress()
    with building(output, key) as home:
        if not ((home / PROVENANCE).is_file() and all(map(intact, home.glob("*.safetensors")))):
            # The folder is incomplete or damaged: the provenance is written last.
            (home / WORK).mkdir(exist_ok=True)
            factors, progress = train(home / WORK)
            _write(checkpoint, factors, home, shard_bytes)
            made = {
                **checkpoint.provenance,
                "recovery": {**record, **_outcome(progress)},
                "versions": versions(),
            }
            _complete(checkpoint, home)
            describe(home, made)
            write_record(home, made)  # last: it marks the folder as complete
        shutil.rmtree(home / WORK, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Recovered(output, size, progress, time.monotonic() - started)


def _outcome(progress: Progress) -> dict[str, Any]:
    """Return the entries of a training for the provenance, without durations, which vary."""
    entries = asdict(progress)
    keys = ("steps", "tokens", "before", "best", "best_step", "stopped")
    return {key: entries[key] for key in keys}


def _write(checkpoint: Checkpoint, factors: Factors, home: Path, shard_bytes: int) -> None:
    infos, storage = checkpoint.weights.infos, checkpoint.storage
    leaves = FACTORS[storage]

    made: dict[str, Tensor] = {}

    def make(name: str) -> Tensor:
        sublayer, _, leaf = name.rpartition(".")
        if sublayer not in factors or leaf not in leaves:
            return checkpoint.weights.read(name)
        if name not in made:
            dtype = getattr(torch, infos[f"{sublayer}.weight"].dtype)
            stored = stored_factors(*factors[sublayer], storage, dtype)
            made.update({f"{sublayer}.{leaf}": tensor for leaf, tensor in stored.items()})
        if not bool(made[name].isfinite().all()):
            raise NumericalError(
                f"The trained {name} is not finite in {infos[name].dtype}.",
                "Train again with a lower `recover.learning_rate`.",
            )
        return made.pop(name)

    # Remove files of an interrupted run: with a time limit, its factors may have been different.
    for path in home.glob("*.safetensors"):
        path.unlink()
    sizes = {name: info.nbytes for name, info in infos.items()}
    write_shards(home, sizes, make, shard_bytes)


def _complete(checkpoint: Checkpoint, home: Path) -> None:
    """Write all files other than weights."""
    write_json(home / "config.json", checkpoint.config)
    copy_companions(checkpoint.folder, home)
    if is_own_file(checkpoint.folder / PLAN_FILE):
        shutil.copyfile(checkpoint.folder / PLAN_FILE, home / PLAN_FILE)
    write_loader(home)


def check_trainable(checkpoint: Checkpoint) -> None:
    """Raise SourceError if the factors of a checkpoint are not stored as floating-point numbers."""
    infos = checkpoint.weights.infos
    for sublayer in checkpoint.ranks:
        info = infos.get(f"{sublayer}.weight")
        if info is None or info.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise SourceError(
                f"The factors of {checkpoint.folder} cannot be trained: {sublayer}.weight is "
                f"{info.dtype if info else 'missing'}.",
                "Recover first, then quantize the result.",
            )


def check_teacher(checkpoint: Source, teacher: Source) -> None:
    """Raise SourceError if two models have different tokenizers."""
    ours, theirs = (each.tokenizer.get_vocab() for each in (checkpoint, teacher))
    sizes = [each.config.get_text_config().vocab_size for each in (checkpoint, teacher)]
    if ours != theirs or sizes[0] != sizes[1]:
        raise SourceError(
            f"{teacher.name} cannot be the teacher of {checkpoint.name}: the tokenizers differ.",
            "Set `model.name` to the model that the checkpoint was made from.",
        )
