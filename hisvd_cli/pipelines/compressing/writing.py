"""Writes a stage as a checkpoint: factorized, fine-tuned, quantized.

Every step but the last writes into the work folder beside the output, where a resumed run finds it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.compression.updating import Update
from hisvd_cli.pipelines.compressing.intermediate_checkpoint import IntermediateCheckpoint
from hisvd_cli.pipelines.compressing.quantization import quantize_compressed, quantizes
from hisvd_cli.pipelines.compressing.single_file import write_single_file
from hisvd_cli.pipelines.compressing.stages.stage import RECORDED, Stage, factored
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.outputs import plan_of
from hisvd_cli.pipelines.planning.byte_budgets import rounded_by
from hisvd_cli.pipelines.recovering.recovery_checks import wants_recovery
from hisvd_cli.pipelines.recovering.recovery_texts import is_same_recovery
from hisvd_cli.pipelines.recovering.training import fine_tune
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.files.scratch import work_folder
from hisvd_cli.utils.progress import Reporter


@dataclass(frozen=True)
class _Steps:
    """The folders that the steps write.

    Attributes:
        factorized: the low-rank checkpoint.
        trained: the checkpoint after fine-tuning, if any.
        final: the checkpoint after quantization, if any: the output, or the folder that becomes a
            single file.
    """

    factorized: Path
    trained: Path
    final: Path


def _steps(path: Path, trains: bool, rounds: bool) -> _Steps:
    work = work_folder(path)
    final = work / "final" if path.suffix == ".pt" else path
    trained = work / "unquantized" if rounds else final
    return _Steps(work / "untrained" if trains else trained, trained, final)


def write_checkpoint(
    resolved: Resolved, last: Stage, path: Path, update: Update | None, reporter: Reporter
) -> tuple[Compressed, float, Path]:
    """Write the checkpoint of the last stage.

    Returns:
        The checkpoint with its times, the seconds of fine-tuning, and a file with its plan.
    """
    resolved = rounded_by(resolved, last.plan)
    rounds = quantizes(resolved) or bool(last.plan.bits)
    steps = _steps(path, wants_recovery(resolved), rounds)
    if path.suffix != ".pt":
        return (*_quantized(resolved, last, steps, rounds, update, reporter), plan_of(path))
    final = IntermediateCheckpoint(steps.final)
    made, training = _kept(resolved, last, final), 0.0
    if made is None:
        made, training = _quantized(resolved, last, steps, rounds, update, reporter)
        final.keep()
    if world().first:
        made = write_single_file(made, last.plan, path)
    return made, training, plan_of(path)


def _kept(
    resolved: Resolved, last: Stage, intermediate: IntermediateCheckpoint
) -> Compressed | None:
    """Return a complete intermediate checkpoint that an interrupted run left; None if there is
    none, or it was made from another plan, other settings or another text."""

    def find() -> Compressed | None:
        made = intermediate.kept(last.plan, resolved.recorded(*RECORDED), last.original_key)
        if made is None or not is_same_recovery(resolved, last.source.original, made.record):
            return None
        return made

    return world().agreed(find)


def _quantized(
    resolved: Resolved,
    last: Stage,
    steps: _Steps,
    rounds: bool,
    update: Update | None,
    reporter: Reporter,
) -> tuple[Compressed, float]:
    """Factorize, fine-tune and quantize the model, each if the settings say so; return the
    checkpoint and the seconds of fine-tuning."""
    if not rounds:
        return _trained(resolved, last, steps, update, reporter)
    unquantized = IntermediateCheckpoint(steps.trained)
    made, training = _kept(resolved, last, unquantized), 0.0
    if made is None:
        made, training = _trained(resolved, last, steps, update, reporter)
        unquantized.keep()
    if world().first:
        bits = last.plan.bits or None
        made = quantize_compressed(
            resolved, last.source, last.calibration, made, steps.final, reporter, bits
        )
        unquantized.remove()
    return made, training


def _trained(
    resolved: Resolved, last: Stage, steps: _Steps, update: Update | None, reporter: Reporter
) -> tuple[Compressed, float]:
    """Factorize the model, and fine-tune the factors if the settings say so; return the checkpoint
    and the seconds of fine-tuning."""
    if not wants_recovery(resolved):
        return factored(resolved, last, steps.factorized, reporter, update), 0.0
    untrained = IntermediateCheckpoint(steps.factorized)
    made = untrained.kept(last.plan, resolved.recorded(*RECORDED), last.original_key)
    if made is None:
        made = factored(resolved, last, untrained.folder, reporter, update)
        untrained.keep()
    started = time.monotonic()
    dense = last.source.original
    size, record = fine_tune(resolved, untrained.folder, steps.trained, dense, reporter)
    untrained.remove()
    seconds = time.monotonic() - started
    return replace(made, output=steps.trained, bytes=size, record=record), seconds
