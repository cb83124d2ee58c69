"""Fine-tunes a checkpoint after all checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hisvd_cli.export.model_card import rewrite_card
from hisvd_cli.finetuning.adaptation import Adapter, adapt
from hisvd_cli.finetuning.factor_training import Factors, distill
from hisvd_cli.finetuning.recover import Recovered, recover
from hisvd_cli.finetuning.trainer import Progress, Schedule
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.recovering.recovery import Recovery, prepare_recovery
from hisvd_cli.pipelines.recovering.recovery_checks import tokens_together
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.progress import Reporter

_MINUTES = 20.0
_RATES = {"distill": 3e-4, "lora": 1e-4}
_BATCHES = {"distill": 4, "lora": 64}


def fine_tune(
    resolved: Resolved, folder: Path, output: Path, dense: Source, reporter: Reporter
) -> tuple[int, Mapping[str, Any]]:
    """Fine-tune the checkpoint ``folder`` of the model ``dense`` into ``output``; return the bytes
    of the weights, and the provenance. Raises HisvdError: see :func:`prepare_recovery`."""
    made = run_recovery(prepare_recovery(resolved, folder, reporter, dense), output, reporter)
    return made.bytes, open_checkpoint(output).provenance


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
    knobs, schedule = recovery.knobs, schedule_of(recovery)
    if recovery.knobs.method == "lora":
        adapter = Adapter(knobs.lora_rank, knobs.lora_alpha, knobs.lora_dropout)
        return adapt(
            recovery.student, recovery.data, schedule, recovery.run, adapter, home, reporter
        )
    if recovery.teacher is None:
        raise UsageError("Distillation needs the dense model.", "Name it with `model.name`.")
    return distill(
        recovery.student,
        recovery.teacher,
        recovery.data,
        schedule,
        recovery.run,
        knobs.temperature,
        home,
        reporter,
    )


def schedule_of(recovery: Recovery) -> Schedule:
    """Return length and options of the training; LoRA has two of equal length."""
    knobs, data = recovery.knobs, recovery.data
    minutes, tokens = knobs.minutes, knobs.tokens
    if minutes is None and tokens is None:
        if knobs.method == "distill":
            minutes = _MINUTES
        else:
            trained = data.rows(0, data.split()[0])
            tokens = 2 * int(knobs.lora_epochs * trained.tokens)
    parts = 2 if knobs.method == "lora" else 1
    return Schedule(
        seconds=None if minutes is None else 60 * minutes / parts,
        tokens=None if tokens is None else max(tokens // parts, 1),
        learning_rate=knobs.learning_rate or _RATES[knobs.method],
        batch=knobs.batch or _BATCHES[knobs.method],
        together=tokens_together(recovery.resolved)[0],
        seed=knobs.seed,
    )


def _record(recovery: Recovery) -> Mapping[str, Any]:
    """Return everything that decides the result, for the provenance."""
    data, teacher = recovery.data, recovery.teacher
    schedule = asdict(schedule_of(recovery))
    for unrecorded in ("state_seconds", "together"):
        del schedule[unrecorded]
    return {
        "method": recovery.knobs.method,
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint} if teacher else None,
        "checkpoint": recovery.student.fingerprint,
        "data": {
            "dataset": data.dataset,
            "kind": data.kind,
            "sha256": data.key,
            "windows": len(data.ids),
            "held_out_windows": data.held_out(),
            "seqlen": data.ids.shape[1],
            "tokens": data.tokens,
        },
        "schedule": schedule,
        "dtype": dtype_name(recovery.run.dtype),
        "settings": recovery.resolved.recorded("model", "recover"),
    }
