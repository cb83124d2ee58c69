"""``evaluate``, ``inspect`` and ``convert``."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from typing_extensions import Unpack

from hisvd_cli.inspection.inspection import audit
from hisvd_cli.pipelines.api.arguments import function, path_of, run_of, text_of
from hisvd_cli.pipelines.api.artifacts import Checkpoint
from hisvd_cli.pipelines.api.findings import Audit, Evaluation
from hisvd_cli.pipelines.api.keywords import (
    ConvertKeywords,
    EvaluateKeywords,
    InspectKeywords,
    PathText,
)
from hisvd_cli.pipelines.api.names import in_python
from hisvd_cli.pipelines.api.plan_result import Plan, plan_file
from hisvd_cli.pipelines.config.settings.fields import any_of
from hisvd_cli.pipelines.conversion import Target, write_form
from hisvd_cli.pipelines.evaluating.reporting import evaluate_into
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.publishing import Hub, check_request, publish
from hisvd_cli.utils.errors import UsageError


@function(EvaluateKeywords)
def evaluate(
    *models: PathText,
    markdown: PathText | None = None,
    csv: PathText | None = None,
    report: PathText | None = None,
    update_card: bool = False,
    fresh: bool = False,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[EvaluateKeywords],
) -> Evaluation:
    """Measure perplexity, and divergence from a baseline, of any models.

    If one of several models fails, the others are still evaluated; see ``failures`` of the result.

    Args:
        models: checkpoints, or any models.
        markdown: also write a markdown table to this file.
        csv: also write CSV to this file.
        report: also write an HTML page with tables, figures and settings to this file.
        update_card: write the results to the model cards of checkpoints.
        fresh: ignore stored results.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a value is invalid, or no model is given.
        HisvdError: the text, the baseline or the only model cannot be used.
    """
    targets = [_target(model) for model in models]
    run = run_of("evaluate", settings, profile, progress)
    named = {"markdown": markdown, "csv": csv, "report": report}
    files = {name: None if path is None else path_of(path, name) for name, path in named.items()}
    grid = evaluate_into(
        run.resolved, targets, files, run.reporter, fresh=fresh, update_card=update_card
    )
    for failure in grid.failures:
        run.reporter.warn(f"{failure.model}: {failure.message}")
    failures = [
        replace(each, message=in_python(each.message), hint=in_python(each.hint))
        for each in grid.failures
    ]
    return Evaluation(replace(grid, failures=failures))


def _target(model: object) -> str:
    """Return the name of a model to evaluate. Raises UsageError for a list of models."""
    if isinstance(model, list | tuple):
        raise UsageError(
            "'models' are separate arguments, not a list.", "Write hisvd.evaluate(*models)."
        )
    return text_of(model, "models", "checkpoints or names of models")


@function(InspectKeywords)
def inspect(
    target: Plan | PathText,
    *,
    check_values: bool = True,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[InspectKeywords],
) -> Audit:
    """Audit a checkpoint: ranks, sizes on disk, provenance, problems. Runs no code from files.

    Args:
        target: checkpoint, ``.pt`` file (of hisvd or not), plan or ``plan.json``, calibration, or
            model.
        check_values: read every tensor and check for NaN.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        SourceError: the target is missing or cannot be read.
        UsageError: the target is not a path.
    """
    takes = "a checkpoint, a plan, a calibration or the name of a model"
    name = "" if isinstance(target, Plan) else text_of(target, "target", takes)
    run = run_of("inspect", settings, profile, progress)
    model = run.resolved.settings.model
    given = (model.revision, model.trust_remote_code, check_values, run.reporter)
    if not isinstance(target, Plan):
        return Audit(audit(name, *given))
    with plan_file(target.data, model.scratch) as file:
        return Audit(replace(audit(str(file), *given), target=f"plan of {target.model}"))


@function(ConvertKeywords)
def convert(
    checkpoint: PathText,
    *,
    to: Target | None = None,
    output: PathText | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[ConvertKeywords],
) -> Checkpoint:
    """Write a checkpoint in another format, or upload it to the Hub.

    Args:
        checkpoint: checkpoint folder, or a ``.pt`` file of hisvd.
        to: ``hf``, a low-rank folder (the default with ``quantize``); ``pt``, a single file;
            ``dense``, a plain model with the factors multiplied.
        output: folder or file to write.
        overwrite: overwrite an existing output.
        push_to_hub: repository to upload the output to, or the checkpoint if there is no output.
        private: make a new repository on the Hub private.
        revision: branch on the Hub to upload to.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a value is invalid, or arguments contradict each other.
        OutputError: ``output`` exists or cannot be written, or the Hub rejects the upload.
    """
    if to is not None and to not in (forms := get_args(Target)):
        raise UsageError(
            f"to={to!r} must be {any_of([*map(repr, forms)])}.",
            "help(hisvd.convert) says what each form is.",
        )
    run = run_of("convert", settings, profile, progress)
    source = path_of(checkpoint, "checkpoint")
    path = None if output is None else output_name(path_of(output))
    hub = Hub(push_to_hub, private, revision) if push_to_hub else None
    if hub is None and (private or revision):
        raise UsageError("'private' and 'revision' apply to uploads only.", "Add 'push_to_hub'.")
    if to is None and run.resolved.is_flag("quantize", "bits"):
        to = "hf"
    run.check_options("convert")
    check_request(source, to, path, hub)
    if to is not None and path is not None:
        write_form(run.resolved, source, to, path, overwrite, run.reporter)
    made = path or source
    return Checkpoint(made, url=publish(made, hub, run.reporter) if hub else None)
