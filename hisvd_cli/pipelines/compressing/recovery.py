"""Settings ─► a checkpoint whose factors a short training has mended."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.calibration.text.self_text import sample_self
from hisvd_cli.calibration.text.tokens import check_seqlen
from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.export.model_card import rewrite_card
from hisvd_cli.finetuning.adaptation import Adapter, adapt, check_peft
from hisvd_cli.finetuning.recover import (
    Classroom,
    Factors,
    Recovered,
    check_teacher,
    check_trainable,
    distill,
    recover,
)
from hisvd_cli.finetuning.trainer import Course, Progress
from hisvd_cli.finetuning.training_data import Lessons, load_lessons, windows_of
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, Checkpoint, open_checkpoint
from hisvd_cli.modeling.layers.lowrank import FACTORS
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import RecoverSettings
from hisvd_cli.pipelines.memory.whole_models import check_training, check_writing
from hisvd_cli.pipelines.samples import SELF, default_dataset, located, stored_dtype
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import SourceError, StaleArtifactError, UsageError
from hisvd_cli.utils.files.checksums import seal, sealed
from hisvd_cli.utils.files.fingerprints import digest, expanded
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.versions import versions

_MINUTES = 20.0
_RATES = {"distill": 3e-4, "lora": 1e-4}
_BATCHES = {"distill": 4, "lora": 64}
_SELF_WINDOWS = 256
_TOGETHER = 2048  # tokens that go through the model at once


@dataclass(frozen=True)
class Recovery:
    """A recovery that has been checked: all that can fail before its work has not.

    Attributes:
        student: the checkpoint.
        teacher: the dense model; None where none is needed.
        room: where models run.
    """

    resolved: Resolved
    student: Source
    teacher: Source | None
    room: Classroom
    lessons: Lessons

    @property
    def knobs(self) -> RecoverSettings:
        """The settings."""
        return self.resolved.settings.recover


def wants_recovery(resolved: Resolved) -> bool:
    """Tell whether a short training was asked for."""
    return resolved.settings.recover.method != "none"


def check_recovery(resolved: Resolved, dense: Source) -> None:
    """Find out before a compression whether the recovery behind it can begin.

    Raises:
        UsageError: several processes, or a library is missing.
        DataError: the text is missing, too short, or lacks a field.
    """
    _check_knobs(resolved)
    check_seqlen(resolved.settings.recover.seqlen, dense)
    calibrated = resolved.settings.calibration
    # Where neither names a text, it is that of a calibration which may not be there yet.
    dataset = _named(resolved) or SELF
    if dataset != SELF:
        _limited(_load(dataset, dense, resolved, calibrated.drop), resolved)
    teacher = dense if resolved.settings.recover.method == "distill" else None
    dtype = _dtype(resolved, stored_dtype(dense))
    check_training(resolved, (dense, teacher), dtype, _together(resolved))
    if dataset == SELF:
        check_writing(resolved, dense, resolved.settings.recover.seqlen, f"--dataset {SELF}")


def check_trains(ranks: Mapping[str, int], resolved: Resolved) -> None:
    """Raise UsageError where no layer is low-rank, so that there is nothing to train."""
    if not ranks:
        raise UsageError(
            f"--recover {resolved.settings.recover.method} trains low-rank layers, and at this "
            "ratio every layer stays as it is.",
            "Lower --ratio, or leave out --recover.",
        )


def _check_knobs(resolved: Resolved) -> None:
    if world().size > 1:
        raise UsageError(
            "--recover runs in one process.",
            "Compress with several, and recover then: compress --from CHECKPOINT --recover.",
        )
    if resolved.settings.recover.method == "lora":
        check_peft()


def prepare_recovery(
    resolved: Resolved, folder: Path, reporter: Reporter, dense: Source | None = None
) -> Recovery:
    """Open everything that a recovery of a checkpoint needs.

    Args:
        resolved: the settings.
        folder: the checkpoint.
        reporter: told of text that is sampled.
        dense: the model that it was made from, where that is open.

    Raises:
        UsageError: no method, several processes, or a library is missing.
        SourceError: no checkpoint, one that cannot be trained, or a teacher that is missing or
            reads other tokens.
        DataError: the text is missing, too short, or lacks a field.
    """
    knobs = resolved.settings.recover
    if knobs.method == "none":
        raise UsageError("Nothing is to be done to the checkpoint.", "Give --recover distill.")
    _check_knobs(resolved)
    checkpoint = open_checkpoint(folder)
    check_trains(checkpoint.ranks, resolved)
    check_trainable(checkpoint)
    student = Source(str(folder), folder)
    teacher = dense or _teacher(resolved, checkpoint)
    if teacher is not None:
        check_teacher(student, teacher)
    check_seqlen(knobs.seqlen, student)
    stored = student.weights.infos[f"{next(iter(checkpoint.ranks))}.weight"].dtype
    dtype = _dtype(resolved, stored)
    check_training(resolved, (student, teacher), dtype, _together(resolved), _factors(checkpoint))
    room = Classroom(pick_device(resolved.settings.model.device), dtype, knobs.checkpointing)
    lessons = _lessons(resolved, checkpoint, student, teacher, room, reporter)
    return Recovery(resolved, student, teacher, room, lessons)


def _dtype(resolved: Resolved, stored: str) -> torch.dtype:
    """Return the dtype that models run in."""
    device = pick_device(resolved.settings.model.device)
    dtype = pick_dtype(resolved.settings.model.dtype, stored, device)
    if dtype == torch.float16:  # whose gradients vanish
        return pick_dtype("auto", "bfloat16", device)
    return dtype


def _together(resolved: Resolved) -> tuple[int, int]:
    """Return how many windows pass a model together, and the tokens in each."""
    seqlen = resolved.settings.recover.seqlen
    return max(_TOGETHER // seqlen, 1), seqlen


def _factors(checkpoint: Checkpoint) -> int:
    """Return the numbers in all low-rank factors of a checkpoint."""
    leaves = FACTORS[checkpoint.storage]
    shapes = [checkpoint.weights.infos[f"{n}.{x}"].shape for n in checkpoint.ranks for x in leaves]
    return sum(torch.Size(shape).numel() for shape in shapes)


def _teacher(resolved: Resolved, checkpoint: Checkpoint) -> Source | None:
    """Open the dense model: as --model names it, else as the provenance does."""
    knobs, model = resolved.settings.recover, resolved.settings.model
    if knobs.method == "lora" and _dataset(resolved, checkpoint) != SELF:
        return None
    made = part(checkpoint.provenance, "model")
    name, revision = model.name or made.get("name"), model.revision or made.get("revision")
    if not name:
        raise SourceError(
            f"{checkpoint.folder} does not say which model it was made from.",
            "Name the dense model with --model.",
        )
    if model.name and not model.revision and model.name != made.get("name"):
        revision = None
    return open_source(str(name), revision, model.trust_remote_code)


def _named(resolved: Resolved) -> str | None:
    """Return which text the settings name, if any."""
    named = (resolved.settings.recover.dataset, resolved.settings.calibration.dataset)
    return next((name for name in named if name != "auto"), None)


def _dataset(resolved: Resolved, checkpoint: Checkpoint) -> str:
    """Return which text: as named, else that of the calibration, else the model's own default."""
    if named := _named(resolved):
        return named
    data = part(part(checkpoint.provenance, "calibration"), "data")
    made = str(part(checkpoint.provenance, "model").get("name"))
    return str(data.get("dataset") or default_dataset(Source(made, checkpoint.folder)))


def reads_the_same(resolved: Resolved, dense: Source, record: Mapping[str, Any]) -> bool:
    """Tell whether the text that the settings name is that of the recovery in a checkpoint's
    ``record``: what a file holds may have changed. Only files are read.

    Raises:
        DataError: see :func:`hisvd_cli.finetuning.training_data.load_lessons`.
    """
    dataset = _named(resolved) or SELF
    if dataset == SELF or not expanded(dataset).is_file():
        return True
    data = part(part(record, "calibration"), "data")
    calibrated = resolved.settings.calibration.drop or str(data.get("drop", ""))
    trained = part(part(record, "recovery"), "data")
    return bool(_load(dataset, dense, resolved, calibrated).key == trained.get("sha256"))


def _lessons(
    resolved: Resolved,
    checkpoint: Checkpoint,
    student: Source,
    teacher: Source | None,
    room: Classroom,
    reporter: Reporter,
) -> Lessons:
    knobs = resolved.settings.recover
    dataset = _dataset(resolved, checkpoint)
    if dataset == SELF and teacher is not None:
        drawn = sample_self(
            teacher,
            knobs.samples or _SELF_WINDOWS,
            knobs.seqlen,
            knobs.seed,
            device=room.device,
            dtype=room.dtype,
            reporter=reporter,
        )
        return windows_of(drawn.flatten(), knobs.seqlen, SELF, digest(drawn.numpy().tobytes()))
    data = part(part(checkpoint.provenance, "calibration"), "data")
    calibrated = resolved.settings.calibration.drop or str(data.get("drop", ""))
    name: str | None = dataset
    if not _named(resolved) and dataset == data.get("dataset"):
        name = located(data)
    if name is None:
        raise StaleArtifactError(
            f"The text '{dataset}' that {checkpoint.folder} was calibrated on is not there, or "
            "reads otherwise now.",
            "Bring it back, or name a text with --recover-dataset.",
        )
    return _limited(replace(_load(name, student, resolved, calibrated), dataset=dataset), resolved)


def _load(dataset: str, source: Source, resolved: Resolved, calibrated: str) -> Lessons:
    """Load a text; ``calibrated`` is what the calibration left out of its own."""
    knobs = resolved.settings.recover
    drop = calibrated if knobs.drop is None else knobs.drop
    return load_lessons(dataset, source, knobs.seqlen, drop)


def _limited(lessons: Lessons, resolved: Resolved) -> Lessons:
    """Return the lessons that were asked for. Raises DataError: too few."""
    wanted = resolved.settings.recover.samples or len(lessons.ids)
    lessons = lessons.rows(0, wanted)
    lessons.held_out()
    return lessons


def run_recovery(recovery: Recovery, output: Path, reporter: Reporter) -> Recovered:
    """Train, and write the checkpoint ``output``. Raises HisvdError: see :func:`recover`."""
    resolved = recovery.resolved
    checkpoint = open_checkpoint(recovery.student.folder)
    return recover(
        checkpoint,
        lambda home: _train(recovery, home, reporter),
        output,
        record=_record(recovery),
        shard_bytes=int(resolved.settings.compress.max_shard_size * 1e9),
        describe=partial(rewrite_card, checkpoint.folder),
    )


def _train(recovery: Recovery, home: Path, reporter: Reporter) -> tuple[Factors, Progress]:
    knobs, course = recovery.knobs, course_of(recovery)
    if recovery.knobs.method == "lora":
        adapter = Adapter(knobs.lora_rank, knobs.lora_alpha, knobs.lora_dropout)
        return adapt(
            recovery.student, recovery.lessons, course, recovery.room, adapter, home, reporter
        )
    if recovery.teacher is None:
        raise UsageError("There is no dense model to learn from.", "Name it with --model.")
    return distill(
        recovery.student,
        recovery.teacher,
        recovery.lessons,
        course,
        recovery.room,
        knobs.temperature,
        home,
        reporter,
    )


def course_of(recovery: Recovery) -> Course:
    """Return how long and how a training is; of lora, each of its two."""
    knobs, lessons = recovery.knobs, recovery.lessons
    minutes, tokens = knobs.minutes, knobs.tokens
    if minutes is None and tokens is None:
        if knobs.method == "distill":
            minutes = _MINUTES
        else:
            trained = lessons.rows(0, len(lessons.ids) - lessons.held_out())
            tokens = 2 * int(knobs.lora_epochs * trained.tokens)
    parts = 2 if knobs.method == "lora" else 1
    return Course(
        seconds=None if minutes is None else 60 * minutes / parts,
        tokens=None if tokens is None else max(tokens // parts, 1),
        learning_rate=knobs.learning_rate or _RATES[knobs.method],
        batch=knobs.batch or _BATCHES[knobs.method],
        together=_together(recovery.resolved)[0],
        seed=knobs.seed,
    )


def _record(recovery: Recovery) -> Mapping[str, Any]:
    """Return what decides the result, for the provenance."""
    lessons, teacher = recovery.lessons, recovery.teacher
    course = asdict(course_of(recovery))
    for unrecorded in ("state_seconds", "together"):
        del course[unrecorded]
    return {
        "method": recovery.knobs.method,
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint} if teacher else None,
        "checkpoint": recovery.student.fingerprint,
        "data": {
            "dataset": lessons.dataset,
            "kind": lessons.kind,
            "sha256": lessons.key,
            "windows": len(lessons.ids),
            "held_out_windows": lessons.held_out(),
            "seqlen": lessons.ids.shape[1],
            "tokens": lessons.tokens,
        },
        "course": course,
        "dtype": dtype_name(recovery.room.dtype),
        "settings": recovery.resolved.recorded("model", "recover"),
    }


@dataclass(frozen=True)
class Unmended:
    """The checkpoint that a compression leaves to what comes after it, recovery or rounding: a
    hidden folder, until the end."""

    folder: Path

    def keep(self) -> None:
        """Have a run that goes on here notice where the finished checkpoint was damaged."""
        if world().first:
            seal(self.folder)
        world().wait()

    def kept(self, plan: Plan, recorded: Mapping[str, Any], calibration: str) -> Compressed | None:
        """Return what an interrupted run left, where it was made by the same plan and settings from
        the calibration of that key and with the same libraries, and was not damaged since."""
        if not sealed(self.folder):
            return None
        record = open_checkpoint(self.folder).provenance
        made_with = (record.get("settings"), part(record, "calibration").get("key"))
        if (*made_with, record.get("versions")) != (recorded, calibration, versions()):
            return None
        if load_plan(self.folder / PLAN_FILE) != plan:
            return None
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return Compressed(self.folder, size, 0.0, 0.0, record)


def unmended(folder: Path) -> Unmended:
    """Return where the checkpoint ``folder`` is compressed to before its recovery."""
    return Unmended(folder.with_name(f".{folder.name}.unmended"))


def mend(resolved: Resolved, raw: Unmended, folder: Path, dense: Source, reporter: Reporter) -> int:
    """Train what was compressed, write it to ``folder``, and return its bytes.

    Raises:
        HisvdError: see :func:`prepare_recovery`.
    """
    made = run_recovery(prepare_recovery(resolved, raw.folder, reporter, dense), folder, reporter)
    shutil.rmtree(raw.folder)
    return made.bytes
