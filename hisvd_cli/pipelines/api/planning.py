"""``calibrate`` and ``plan``."""

from __future__ import annotations

from typing_extensions import Unpack

from hisvd_cli.modeling.structure.tensors import tell_notes
from hisvd_cli.pipelines.api.arguments import Given, function, run_of, text_of
from hisvd_cli.pipelines.api.artifacts import Calibration, given_with
from hisvd_cli.pipelines.api.keywords import CalibrateKeywords, PathText, PlanKeywords
from hisvd_cli.pipelines.api.plan_result import Plan
from hisvd_cli.pipelines.calibration import ensure_calibration
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.planning.methods import plan_needs
from hisvd_cli.pipelines.planning.plan_checks import check_plan_settings
from hisvd_cli.pipelines.planning.plans import plan_model
from hisvd_cli.utils.errors import UsageError


@function(CalibrateKeywords)
def calibrate(
    model: PathText,
    *,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[CalibrateKeywords],
) -> Calibration:
    """Collect activation statistics of a model, or reuse existing ones.

    Args:
        model: Hub id, folder, ``.gguf`` file, or ``demo`` for the built-in demo model.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a value is invalid.
        HisvdError: the model or the text cannot be used.
    """
    name = text_of(model, "model", "the name or path of a model")
    named = {("model", "name"): name}
    run = run_of("calibrate", settings, profile, progress, named)
    source = named_source(run.resolved)
    tell_notes(source, run.reporter)
    made, seconds = ensure_calibration(run.resolved, source, run.reporter, reuse_any=False)
    return Calibration(name, made, seconds, _kept(run.resolved, "model", "calibration"))


@function(PlanKeywords)
def plan(
    source: Calibration | PathText,
    *,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[PlanKeywords],
) -> Plan:
    """Choose the rank of every layer.

    Statistics that the methods need, such as gradients, are collected if they are missing.

    Args:
        source: a calibration; or a model, planned from its calibration if it has one. Without one,
            methods that need no more than second moments plan from the weights alone.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a value is invalid, or the source is a plan.
        BudgetError: the ratio cannot be met.
        HisvdError: the model or the calibration cannot be used.
    """
    if isinstance(source, Plan):
        raise UsageError(
            "'source' is already a plan.", "Plan its model or its calibration with other settings."
        )
    if not isinstance(source, Calibration):
        source = text_of(source, "source", "a calibration or the name of a model")
    run = run_of("plan", settings, profile, progress, given_with(source))
    run.one_plan()
    run.check_options("plan")
    needs = plan_needs(run.resolved.settings)
    if isinstance(source, Calibration) or needs - {"moments"}:
        model = named_source(run.resolved)
        check_plan_settings(run.resolved, model)
        ensure_calibration(run.resolved, model, run.reporter, needs=needs)
    made = plan_model(run.resolved, run.reporter)[0]
    return Plan(made, _kept(run.resolved, "model", "calibration", "compress"))


def _kept(resolved: Resolved, *sections: str) -> Given:
    """Return the settings of some sections that were given, also by a preset or a profile, for the
    calls that follow."""
    return {key: resolved.value(*key) for key in resolved.origins if key[0] in sections}
