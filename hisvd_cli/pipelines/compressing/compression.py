"""Settings ─► a compressed checkpoint, and everything that it needs on the way."""

from __future__ import annotations

import time
from pathlib import Path

from hisvd_cli.compression.stage_times import keep_times
from hisvd_cli.modeling.skeleton import tell_notes
from hisvd_cli.pipelines.calibration import ensure_calibration, named_source
from hisvd_cli.pipelines.compressing.before_and_after import before_and_after, evaluation_text
from hisvd_cli.pipelines.compressing.compression_checks import check_request
from hisvd_cli.pipelines.compressing.outcome import Outcome
from hisvd_cli.pipelines.compressing.stage import Stage
from hisvd_cli.pipelines.compressing.stages import last_stage
from hisvd_cli.pipelines.compressing.updates import prepare_update
from hisvd_cli.pipelines.compressing.writing import write_checkpoint
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.evaluating.evaluation import check_texts
from hisvd_cli.pipelines.outputs import check_place_of, output_path, peak_memory
from hisvd_cli.pipelines.planning.methods import decomposer_needs, plan_needs
from hisvd_cli.pipelines.planning.plan_files import open_plan
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.pipelines.recovering.recovery_checks import check_trains, wants_recovery
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
    """Calibrate, plan and compress, reusing what is there.

    Raises:
        HisvdError: see :func:`check_request`; nothing is written then.
    """
    source = named_source(resolved)
    tell_notes(source, reporter)
    check_request(resolved, source, output, plan_file, overwrite)
    plan = open_plan(plan_file, source) if plan_file else None
    path = output_path(resolved, output, plan_file)
    text = evaluation_text(resolved, source) if world().first else None
    needs = decomposer_needs(resolved.settings.compress)
    if plan is None:
        needs |= plan_needs(resolved.settings)
    calibration, calibrating = ensure_calibration(resolved, source, reporter, needs=needs)
    if text is not None:
        check_texts([text], calibration.manifest, source.name)
    update = prepare_update(resolved, source, calibration, reporter)
    started = time.monotonic()
    fixed = plan is not None
    plan = plan or make_plans(resolved, source, calibration, reporter)[0]
    planning = time.monotonic() - started
    if wants_recovery(resolved):
        check_trains(plan.ranks, resolved)
    # Again: all that may have come to stand there while the model was calibrated and planned.
    world().agreed(lambda: check_place_of(resolved, source, path, plan_file, overwrite))
    first = Stage(source, calibration, plan)
    with last_stage(resolved, first, fixed, path, reporter) as (last, before):
        made, plan_path, recovering = write_checkpoint(resolved, last, path, update, reporter)
    seconds = {
        "calibrate": calibrating + before["calibrate"],
        "plan": planning + before["plan"],
        "decompose": made.decompose_seconds + before["decompose"],
        "write": made.write_seconds + before["write"],
        **({"recover": recovering} if wants_recovery(resolved) else {}),
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
        dtype=calibration.manifest["dtype"],
        stored_dtype=source.weights.dtype,
    )
