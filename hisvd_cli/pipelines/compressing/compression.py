"""Compresses the model of the settings, with all steps before."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.modeling.checkpoints.stage_times import keep_times
from hisvd_cli.modeling.structure.tensors import tell_notes
from hisvd_cli.pipelines.compressing.compression_checks import check_request
from hisvd_cli.pipelines.compressing.first_stage import prepare
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.compressing.stages.last_stage import last_stage
from hisvd_cli.pipelines.compressing.writing import write_checkpoint
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.before_and_after import before_and_after, evaluation_text
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.outputs import check_place_of, output_path, peak_memory
from hisvd_cli.pipelines.recovering.recovery_checks import wants_recovery
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.files.scratch import clear_beside
from hisvd_cli.utils.progress import Reporter


def compress_model(
    resolved: Resolved,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
    reporter: Reporter,
) -> Outcome:
    """Calibrate, plan and compress; existing results are reused.

    Raises:
        HisvdError: see :func:`check_request`; nothing is written then.
    """
    source = named_source(resolved)
    tell_notes(source, reporter)
    check_request(resolved, source, output, plan_file, overwrite)
    path = output_path(resolved, output, plan_file)
    text = evaluation_text(resolved, source) if world().first else None
    ready = prepare(resolved, source, plan_file, text, reporter)
    # Check again: the output may have come to exist during calibration and planning.
    world().agreed(lambda: check_place_of(resolved, source, path, plan_file, overwrite))
    with last_stage(resolved, ready.stage, ready.given, path, reporter) as (last, before):
        made, training, plan_path = write_checkpoint(resolved, last, path, ready.update, reporter)
    seconds = {
        "calibrate": ready.calibrating + before["calibrate"],
        "plan": ready.planning + before["plan"],
        "decompose": made.decompose_seconds + before["decompose"],
        "write": made.write_seconds + before["write"],
        **({"recover": training} if wants_recovery(resolved) else {}),
    }
    if world().first:
        keep_times(made.record, seconds)
        clear_beside(path)
    return Outcome(
        output=path,
        plan=last.plan,
        plan_path=plan_path,
        bytes=made.bytes,
        dense_bytes=source.weights.total_bytes,
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
        perplexity=before_and_after(resolved, source, path, text, reporter),
        dtype=ready.stage.calibration.manifest["dtype"],
        stored_dtype=source.weights.dtype,
    )
