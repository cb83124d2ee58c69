"""``calibrate``, ``plan`` and ``compress``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import Unpack

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint
from hisvd_cli.modeling.skeleton import tell_notes
from hisvd_cli.pipelines.api.arguments import Given, Run, function, path_of, run_of
from hisvd_cli.pipelines.api.keywords import (
    CalibrateKeywords,
    CompressKeywords,
    PathText,
    PlanKeywords,
)
from hisvd_cli.pipelines.api.results import Calibration, Checkpoint, Plan
from hisvd_cli.pipelines.calibration import ensure_calibration, named_source
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.planning.methods import plan_needs
from hisvd_cli.pipelines.planning.plan_checks import check_knobs
from hisvd_cli.pipelines.planning.plans import plan_model
from hisvd_cli.pipelines.recovering.from_checkpoint import recover_checkpoint
from hisvd_cli.utils.files.scratch import scratch_folder


@function(CalibrateKeywords)
def calibrate(
    model: PathText,
    *,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[CalibrateKeywords],
) -> Calibration:
    """Collect activation statistics of a model, or find them where they were collected before.

    Args:
        model: Hub id, folder, ``.gguf`` file, or ``demo``, a small model inside hisvd.
        profile: a profile to read, a file or the name of one that hisvd brings.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a wrong value.
        HisvdError: the model or the text cannot be used.
    """
    named = {("model", "name"): os.fspath(model)}
    run = run_of("calibrate", settings, profile, progress, named)
    source = named_source(run.resolved)
    tell_notes(source, run.reporter)
    made, seconds = ensure_calibration(run.resolved, source, run.reporter, reuse_any=False)
    return Calibration(os.fspath(model), made, seconds, _kept(run.resolved, "model", "calibration"))


@function(PlanKeywords)
def plan(
    source: Calibration | PathText,
    *,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[PlanKeywords],
) -> Plan:
    """Choose the rank of every layer.

    Statistics that the method needs and the calibration lacks are added to it.

    Args:
        source: a calibration; or a model, whose calibration is used where it has one, and its
            weights alone where it has none.
        profile: a profile to read, a file or the name of one that hisvd brings.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a wrong value.
        BudgetError: a ratio that cannot be met.
        HisvdError: the model or the calibration cannot be used.
    """
    run = run_of("plan", settings, profile, progress, _given(source))
    run.one_plan()
    if isinstance(source, Calibration):
        model = named_source(run.resolved)
        check_knobs(run.resolved, model)
        needs = plan_needs(run.resolved.settings)
        ensure_calibration(run.resolved, model, run.reporter, needs=needs)
    made = plan_model(run.resolved, run.reporter)[0]
    return Plan(made, _kept(run.resolved, "model", "calibration", "compress"))


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
    """Compress a model, or fine-tune a checkpoint that was compressed before.

    Args:
        source: a plan, or its ``.json`` file, to carry out; a calibration or a model to plan and
            compress; or a checkpoint to fine-tune, with ``recover``.
        output: folder, or one file ending in ``.pt``; by default MODEL-RATIO, or CHECKPOINT-METHOD.
        overwrite: replace a checkpoint that is there.
        profile: a profile to read, a file or the name of one that hisvd brings.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a wrong value, or a setting that the plan has decided already.
        OutputError: something is at ``output``.
        HisvdError: the model, the text or the plan cannot be used.
    """
    source = _opened(source)
    run = run_of("compress", settings, profile, progress, _given(source))
    path = None if output is None else output_name(path_of(output))
    if isinstance(source, Checkpoint):
        made = recover_checkpoint(run.resolved, source.path, path, overwrite, run.reporter)
        return Checkpoint(Path(made["output"]))
    with _plan_file(source, run) as file:
        outcome = compress_model(run.resolved, path, file, overwrite, run.reporter)
    return Checkpoint(outcome.output, outcome)


def _opened(
    source: Plan | Calibration | Checkpoint | PathText,
) -> Plan | Calibration | Checkpoint | str:
    """Return what a path stands for: a plan, a checkpoint, or the name of a model."""
    if isinstance(source, Plan | Calibration | Checkpoint):
        return source
    path = path_of(source)
    if path.suffix == ".json":
        found = Plan(load_plan(path))
        return Plan(found.data, {("model", "name"): found.model})
    return Checkpoint(path) if is_checkpoint(path) else os.fspath(source)


def _given(source: Plan | Calibration | Checkpoint | PathText) -> Given:
    """Return the settings that what a function works on brings along."""
    if isinstance(source, Calibration):
        return {**source.given, ("calibration", "path"): str(source.folder)}
    if isinstance(source, Plan):
        return source.given
    return {} if isinstance(source, Checkpoint) else {("model", "name"): os.fspath(source)}


def _kept(resolved: Resolved, *sections: str) -> Given:
    """Return the settings of some sections that were given a value, by a preset or a profile too:
    the functions that follow work with the same."""
    return {key: resolved.value(*key) for key in resolved.origins if key[0] in sections}


@contextmanager
def _plan_file(source: Plan | Calibration | str, run: Run) -> Iterator[Path | None]:
    """Yield a file with the plan, which the pipeline reads as it does for the command line; None
    where it is to make one."""
    if not isinstance(source, Plan):
        run.one_plan()
        yield None
        return
    with scratch_folder(run.resolved.settings.model.scratch) as folder:
        file = folder / "plan.json"
        source.data.save(file)
        yield file
