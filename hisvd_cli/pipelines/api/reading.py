"""``evaluate``, ``inspect`` and ``convert``."""

from __future__ import annotations

import os
from dataclasses import replace

from typing_extensions import Unpack

from hisvd_cli.inspection.inspection import audit
from hisvd_cli.pipelines.api.arguments import function, path_of, run_of
from hisvd_cli.pipelines.api.artifacts import Checkpoint
from hisvd_cli.pipelines.api.findings import Audit, Evaluation
from hisvd_cli.pipelines.api.keywords import (
    ConvertKeywords,
    EvaluateKeywords,
    InspectKeywords,
    PathText,
)
from hisvd_cli.pipelines.api.names import in_python
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
    run = run_of("evaluate", settings, profile, progress)
    named = {"markdown": markdown, "csv": csv, "report": report}
    files = {name: None if path is None else path_of(path) for name, path in named.items()}
    targets = [os.fspath(model) for model in models]
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


@function(InspectKeywords)
def inspect(
    target: PathText,
    *,
    check_values: bool = True,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[InspectKeywords],
) -> Audit:
    """Audit a checkpoint: ranks, sizes on disk, provenance, problems. Runs no code from files.

    Args:
        target: checkpoint, ``.pt`` file (of hisvd or not), ``plan.json``, calibration, or model.
        check_values: read every tensor and check for NaN.
        profile: profile to read, a file or the name of a built-in profile.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        SourceError: the target is missing or cannot be read.
    """
    run = run_of("inspect", settings, profile, progress)
    model = run.resolved.settings.model
    name = os.fspath(target)
    return Audit(audit(name, model.revision, model.trust_remote_code, check_values, run.reporter))


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
        UsageError: arguments contradict each other.
        OutputError: ``output`` exists or cannot be written, or the Hub rejects the upload.
    """
    run = run_of("convert", settings, profile, progress)
    source = path_of(checkpoint)
    path = None if output is None else output_name(path_of(output))
    hub = Hub(push_to_hub, private, revision) if push_to_hub else None
    if hub is None and (private or revision):
        raise UsageError("private and revision apply to uploads only.", "Add push_to_hub.")
    if to is None and run.resolved.is_flag("quantize", "bits"):
        to = "hf"
    check_request(source, to, path, hub)
    if to is not None and path is not None:
        write_form(run.resolved, source, to, path, overwrite, run.reporter)
    made = path or source
    return Checkpoint(made, url=publish(made, hub, run.reporter) if hub else None)
