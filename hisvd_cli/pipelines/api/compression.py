"""``compress``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import Unpack

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint
from hisvd_cli.pipelines.api.arguments import Run, function, path_of, run_of, text_of
from hisvd_cli.pipelines.api.artifacts import Calibration, Checkpoint, given_with
from hisvd_cli.pipelines.api.keywords import CompressKeywords, PathText
from hisvd_cli.pipelines.api.plan_result import Plan, plan_file
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.recovering.from_checkpoint import recover_checkpoint


@function(CompressKeywords)
def compress(
    source: Plan | Calibration | Checkpoint | PathText,
    *,
    output: PathText | None = None,
    overwrite: bool = False,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[CompressKeywords],
) -> Checkpoint:
    """Compress a model, or fine-tune a checkpoint.

    Args:
        source: a plan, or its ``.json`` file, to apply; a calibration or a model to plan and
            compress; or a checkpoint to fine-tune with ``recover``.
        output: folder, or one file ending in ``.pt``; by default MODEL-RATIO, or CHECKPOINT-METHOD.
        overwrite: overwrite an existing checkpoint.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a value is invalid, or the given plan decides a setting.
        OutputError: ``output`` exists or cannot be written.
        HisvdError: the model, the text or the plan cannot be used.
    """
    source = _opened(source)
    run = run_of("compress", settings, profile, progress, given_with(source))
    path = None if output is None else output_name(path_of(output))
    if isinstance(source, Checkpoint):
        run.check_options("recover")
        made = recover_checkpoint(run.resolved, source.path, path, overwrite, run.reporter)
        return Checkpoint(Path(made["output"]))
    run.check_options("compress", source.data if isinstance(source, Plan) else None)
    with _plan_file(source, run) as file:
        outcome = compress_model(run.resolved, path, file, overwrite, run.reporter)
    return Checkpoint(outcome.output, outcome)


def _opened(
    source: Plan | Calibration | Checkpoint | PathText,
) -> Plan | Calibration | Checkpoint | str:
    """Return what a path names: a plan, a checkpoint, or a model."""
    if isinstance(source, Plan | Calibration | Checkpoint):
        return source
    text = text_of(source, "source", "a plan, a calibration, a checkpoint or the name of a model")
    path = path_of(text)
    if path.suffix == ".json":
        found = Plan(load_plan(path))
        return Plan(found.data, {("model", "name"): found.model})
    return Checkpoint(path) if is_checkpoint(path) else text


@contextmanager
def _plan_file(source: Plan | Calibration | str, run: Run) -> Iterator[Path | None]:
    """Yield a file with the plan for the pipeline, None if the pipeline is to make a plan."""
    if not isinstance(source, Plan):
        run.one_plan()
        yield None
        return
    with plan_file(source.data, run.resolved.settings.model.scratch) as file:
        yield file
