"""A checkpoint ─► the same checkpoint with factors that a short training has mended.

Ranks, storage and dtypes stay: only numbers change.
"""

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

from hisvd_cli.finetuning.distillation import divergence_from, summed_loss
from hisvd_cli.finetuning.teacher import Teacher
from hisvd_cli.finetuning.trained_pairs import TrainedPair, open_pairs, stored_factors
from hisvd_cli.finetuning.trainer import Course, Progress, Trainee, Training
from hisvd_cli.finetuning.training_data import Lessons
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, Checkpoint
from hisvd_cli.modeling.checkpoints.checkpoint_config import write_loader
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE, Describe, write_record
from hisvd_cli.modeling.checkpoints.shards import write_shards
from hisvd_cli.modeling.decoding import TwoParts
from hisvd_cli.modeling.divergence import token_divergences, token_losses
from hisvd_cli.modeling.layers.lowrank import FACTORS
from hisvd_cli.modeling.sources.companions import copy_companions, is_own_file
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_model, load_source
from hisvd_cli.utils.errors import NumericalError, SourceError
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions

WORK = "training"
"""The folder, inside one that is being built, of what a training keeps to go on after a kill."""


@dataclass(frozen=True)
class Recovered:
    """A finished recovery: where, how large, how it went, and how long training took (seconds)."""

    output: Path
    bytes: int
    progress: Progress
    seconds: float


Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Sublayer ─► U ``[m, r]`` and V ``[r, n]``."""
Train = Callable[[Path], tuple[Factors, Progress]]
"""Trains in a folder."""


def recover(
    checkpoint: Checkpoint,
    train: Train,
    output: Path,
    *,
    record: Mapping[str, Any],
    shard_bytes: int,
    describe: Describe,
) -> Recovered:
    """Train the factors of a checkpoint, and write it anew.

    A run that was interrupted goes on where its training last kept its state.

    Args:
        checkpoint: what is to be mended.
        train: returns other factors.
        output: the folder; what stands there is replaced once the new one is complete.
        record: everything that decides the result, the checkpoint's fingerprint included;
            recorded as it is.
        shard_bytes: largest size of a weight file.
        describe: writes the model card.

    Raises:
        NumericalError: a trained factor overflows in the dtype on disk.
        OutputError, SourceError: see each.
    """
    checkpoint.refuse_own_code()
    started = time.monotonic()
    about = json.dumps([record, checkpoint.provenance], sort_keys=True)
    key = digest(about, str(shard_bytes))
    progress = Progress()
    with building(output, key) as home:
        if not ((home / PROVENANCE).is_file() and all(map(intact, home.glob("*.safetensors")))):
            # The provenance, which is written last, is missing; or weights were damaged since.
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
            write_record(home, made)  # last: it says that the folder is complete
        shutil.rmtree(home / WORK, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Recovered(output, size, progress, time.monotonic() - started)


def _outcome(progress: Progress) -> dict[str, Any]:
    """Return what the provenance tells of a training: no times, which differ between runs."""
    told = asdict(progress)
    return {key: told[key] for key in ("steps", "tokens", "before", "best", "best_step", "stopped")}


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
                "Train again with a lower --recover-learning-rate.",
            )
        return made.pop(name)

    # A run that was killed here may have ended its training elsewhere, if that is bounded in time.
    for path in home.glob("*.safetensors"):
        path.unlink()
    sizes = {name: info.nbytes for name, info in infos.items()}
    write_shards(home, sizes, make, shard_bytes)


def _complete(checkpoint: Checkpoint, home: Path) -> None:
    """Write all that is no weight."""
    write_json(home / "config.json", checkpoint.config)
    copy_companions(checkpoint.folder, home)
    if is_own_file(checkpoint.folder / PLAN_FILE):
        shutil.copyfile(checkpoint.folder / PLAN_FILE, home / PLAN_FILE)
    write_loader(home)


def check_trainable(checkpoint: Checkpoint) -> None:
    """Raise SourceError where a checkpoint's factors are no plain numbers."""
    infos = checkpoint.weights.infos
    for sublayer in checkpoint.ranks:
        info = infos.get(f"{sublayer}.weight")
        if info is None or info.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise SourceError(
                f"{checkpoint.folder} holds factors that cannot be trained: {sublayer}.weight is "
                f"{info.dtype if info else 'missing'}.",
                "Recover first, and quantize what came of it.",
            )


def check_teacher(checkpoint: Source, teacher: Source) -> None:
    """Raise SourceError where two models do not read the same text as the same tokens."""
    ours, theirs = (each.tokenizer.get_vocab() for each in (checkpoint, teacher))
    sizes = [each.config.get_text_config().vocab_size for each in (checkpoint, teacher)]
    if ours != theirs or sizes[0] != sizes[1]:
        raise SourceError(
            f"{teacher.name} cannot teach {checkpoint.name}: it has another tokenizer.",
            "Name the model that the checkpoint was made from with --model.",
        )


@dataclass(frozen=True)
class Classroom:
    """Where models run.

    Attributes:
        device: of both models.
        dtype: in which products are made.
        checkpointing: make a block's activations again in the backward pass, not keep them.
    """

    device: torch.device
    dtype: torch.dtype
    checkpointing: bool = False


def distill(
    student: Source,
    teacher: Source,
    lessons: Lessons,
    course: Course,
    room: Classroom,
    temperature: float,
    home: Path,
    reporter: Reporter,
) -> tuple[Factors, Progress]:
    """Train all low-rank factors towards the dense model's distributions.

    Args:
        student: the checkpoint.
        teacher: the dense model.
        lessons: the text; its last windows are held back.
        course: how long and how.
        room: where models run.
        temperature: of the distributions in training; they are measured at 1.
        home: folder in which an interrupted training goes on.
        reporter: told of progress.

    Returns:
        The factors of the best held-out state, and how the training went.

    Raises:
        NumericalError: not even the untrained checkpoint can be measured.
    """
    model = load_model(student.folder, room.device, room.dtype)
    pairs = open_pairs(model)
    keep_activations(model, room.checkpointing)
    pupil = TwoParts(model, room.dtype)
    dense = load_source(teacher, room.device, room.dtype)
    dense.requires_grad_(False)
    width = teacher.config.get_text_config().hidden_size
    tutor = Teacher(TwoParts(dense, room.dtype), lessons.ids, width, home / "teacher")
    kept = len(lessons.ids) - lessons.held_out()

    def loss(rows: Tensor) -> tuple[Tensor, int]:
        counted = lessons.counted[rows].to(room.device)
        reference = tutor.states(rows)[counted]
        states = pupil.states(lessons.ids[rows])[counted]
        criterion = divergence_from(reference, tutor.head, temperature)
        return summed_loss(states, pupil.head, criterion), len(states)

    held = torch.arange(kept, len(lessons.ids))
    trainee = Trainee(
        parameters_of(pairs),
        kept,
        loss,
        lambda: held_out_measures(pupil, lessons, held, course.together, tutor),
    )
    best, progress = Training(trainee, course, home, room.device, reporter).run()
    return {name: (best[f"{name}.u"], best[f"{name}.v"]) for name in pairs}, progress


def parameters_of(pairs: Mapping[str, TrainedPair]) -> dict[str, torch.nn.Parameter]:
    """Return what is trained of pairs, by ``SUBLAYER.u`` and ``SUBLAYER.v``."""
    return {
        f"{name}.{leaf}": parameter
        for name, pair in pairs.items()
        for leaf, parameter in (("u", pair.u), ("v", pair.v))
    }


def keep_activations(model: Any, again: bool) -> None:
    """Have each block's activations made again in the backward pass, where that is wanted."""
    if not again:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.get_decoder().layers:
        layer.training = True  # the block's own flag: what is in it, dropout too, stays as it is


@torch.no_grad()
def held_out_measures(
    pupil: TwoParts, lessons: Lessons, rows: Tensor, together: int, tutor: Teacher | None
) -> dict[str, float]:
    """Return means over the tokens that count of windows ``[B]``, in nats.

    They are the KL divergence from the teacher (where there is one), and the loss.
    """
    divergence = nats = count = 0.0
    for part in rows.split(together):
        states = pupil.states(lessons.ids[part])
        reference = tutor.states(part) if tutor else None
        for i, row in enumerate(part):
            counted = lessons.counted[row, :-1].to(states.device)
            logits = pupil.head(states[i])
            losses = token_losses(logits, lessons.ids[row].to(logits.device))
            nats += float(losses[counted].double().sum())
            count += float(counted.sum())
            if tutor and reference is not None:
                kl, _ = token_divergences(tutor.head(reference[i]), logits)
                divergence += float(kl[counted].double().sum())
    measures = {"kl": divergence / count} if tutor else {}
    return {**measures, "loss": nats / count}
