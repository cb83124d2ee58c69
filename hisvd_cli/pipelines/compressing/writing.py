"""A stage and the settings ─► the checkpoint on disk: factored, fine-tuned, quantized."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.compression.updating import Update
from hisvd_cli.export.convert import to_pt
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE, open_checkpoint
from hisvd_cli.pipelines.compressing.quantization import quantize_compressed, quantizes
from hisvd_cli.pipelines.compressing.stage import RECORDED, Stage, factored
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.outputs import plan_beside
from hisvd_cli.pipelines.planning.byte_budgets import rounded_by
from hisvd_cli.pipelines.recovering.intermediate_checkpoint import Unmended, mend, unmended
from hisvd_cli.pipelines.recovering.recovery_checks import wants_recovery
from hisvd_cli.pipelines.recovering.recovery_texts import reads_the_same
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.progress import Reporter


def write_checkpoint(
    resolved: Resolved, last: Stage, path: Path, update: Update | None, reporter: Reporter
) -> tuple[Compressed, Path, float]:
    """Write the checkpoint; return what it took, a file that holds its plan, and the seconds of
    its recovery."""
    single = path.suffix == ".pt"
    folder = path.with_name(f".{path.name}.folder") if single else path
    resolved = rounded_by(resolved, last.plan)
    rounds = quantizes(resolved) or bool(last.plan.bits)
    whole = folder.with_name(f".{path.name}.whole") if rounds else folder
    left = world().agreed(lambda: _unrounded(resolved, last, whole)) if rounds else None
    made, recovering = left or _mended(resolved, last, whole, update, reporter)
    if rounds and not left:
        Unmended(whole).keep()
    if rounds and world().first:
        bits = last.plan.bits or None
        made = quantize_compressed(
            resolved, last.source, last.calibration, made, folder, reporter, bits
        )
    if not single or not world().first:
        return made, path / PLAN_FILE, recovering
    started = time.monotonic()
    to_pt(open_checkpoint(folder), path)
    sidecar = plan_beside(path)
    if not sidecar.exists() or load_plan(sidecar) != last.plan:  # it may be the one that was given
        last.plan.save(sidecar)
    shutil.rmtree(folder)
    writing = made.write_seconds + time.monotonic() - started
    size = path.stat().st_size
    single_file = replace(made, output=path, bytes=size, write_seconds=writing)
    return single_file, plan_beside(path), recovering


def _unrounded(resolved: Resolved, last: Stage, folder: Path) -> tuple[Compressed, float] | None:
    """Return what a run left that was interrupted while it rounded, and no seconds of training;
    None where there is nothing, or it was made by another plan or settings."""
    made = Unmended(folder).kept(last.plan, resolved.recorded(*RECORDED), last.original_key)
    wanted = resolved.recorded("model", "recover") if wants_recovery(resolved) else None
    if made is None or part(made.record, "recovery").get("settings") != wanted:
        return None
    if wanted and not reads_the_same(resolved, last.source.original, made.record):
        return None
    return made, 0.0


def _mended(
    resolved: Resolved, last: Stage, folder: Path, update: Update | None, reporter: Reporter
) -> tuple[Compressed, float]:
    """Factor the model, and train the factors where that is asked for; return what that made, and
    the seconds of the training."""
    if not wants_recovery(resolved):
        return factored(resolved, last, folder, reporter, update), 0.0
    raw, recorded = unmended(folder), resolved.recorded(*RECORDED)
    made = raw.kept(last.plan, recorded, last.original_key)
    if made is None:
        made = factored(resolved, last, raw.folder, reporter, update)
        raw.keep()
    started = time.monotonic()
    size = mend(resolved, raw, folder, last.source.original, reporter)
    record = open_checkpoint(folder).provenance
    return replace(made, output=folder, bytes=size, record=record), time.monotonic() - started
