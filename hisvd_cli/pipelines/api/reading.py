"""``evaluate``, ``inspect`` and ``convert``."""

from __future__ import annotations

import os

from typing_extensions import Unpack

from hisvd_cli.inspection.inspection import audit
from hisvd_cli.pipelines.api.arguments import function, path_of, run_of
from hisvd_cli.pipelines.api.keywords import (
    ConvertKeywords,
    EvaluateKeywords,
    InspectKeywords,
    PathText,
)
from hisvd_cli.pipelines.api.reports import Audit, Evaluation
from hisvd_cli.pipelines.api.results import Checkpoint
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
    """Measure perplexity and divergence from a baseline, of compressed or of any models.

    Of several models, one that fails leaves the others; ``failures`` of the result names it.

    Args:
        models: checkpoints, or any models.
        markdown: also write a markdown table to this file.
        csv: also write CSV to this file.
        report: also write an HTML page with tables, figures and settings to this file.
        update_card: put the results into the model cards of checkpoints.
        fresh: measure again what was measured before.
        profile: a profile to read, a file or the name of one that hisvd brings.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: a wrong value, or no model.
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
    return Evaluation(grid)


@function(InspectKeywords)
def inspect(
    target: PathText,
    *,
    check_values: bool = True,
    profile: PathText | None = None,
    progress: bool = True,
    **settings: Unpack[InspectKeywords],
) -> Audit:
    """Audit what is on disk: ranks, sizes, provenance, problems. Runs no code from a file.

    Args:
        target: checkpoint, ``.pt`` file (of hisvd or not), ``plan.json``, calibration, or model.
        check_values: read every tensor and look for NaN.
        profile: a profile to read, a file or the name of one that hisvd brings.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        SourceError: nothing is there, or it cannot be read at all.
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
    """Write a checkpoint in another form, or upload it to the Hub.

    Args:
        checkpoint: checkpoint folder, or a ``.pt`` file of hisvd.
        to: ``hf``, a low-rank folder (as is ``quantize`` without it); ``pt``, one file; ``dense``,
            a plain model with the factors multiplied.
        output: folder or file to write.
        overwrite: replace what is there.
        push_to_hub: upload to this repository what was written, or the checkpoint as it is.
        private: make a new repository on the Hub private.
        revision: branch on the Hub to upload to.
        profile: a profile to read, a file or the name of one that hisvd brings.
        progress: report progress and warnings on stderr.
        settings: see below.

    Raises:
        UsageError: arguments that do not go together.
        OutputError: something is at ``output``, or the Hub does not accept it.
    """
    run = run_of("convert", settings, profile, progress)
    source = path_of(checkpoint)
    path = None if output is None else output_name(path_of(output))
    hub = Hub(push_to_hub, private, revision) if push_to_hub else None
    if hub is None and (private or revision):
        raise UsageError("private and revision say how to upload.", "Add push_to_hub.")
    if to is None and run.resolved.is_flag("quantize", "bits"):
        to = "hf"
    check_request(source, to, path, hub)
    if to is not None and path is not None:
        write_form(run.resolved, source, to, path, overwrite, run.reporter)
    made = path or source
    return Checkpoint(made, url=publish(made, hub, run.reporter) if hub else None)
