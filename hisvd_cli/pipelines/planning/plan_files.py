"""Reads plan files and checks paths for writing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.compression.factorize import check_plan
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.outputs import check_plan_output
from hisvd_cli.pipelines.planning.plan_fit import check_fit
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.text_output import check_text_place, takes_text


def open_plan(path: Path, source: Source) -> Plan:
    """Read a plan made for ``source``.

    Raises:
        SourceError: there is no plan, its values disagree, or a row does not fit the model.
        StaleArtifactError: it was made for another model.
    """
    plan = load_plan(path)
    check_plan(plan, source)
    check_fit(plan, path, source)
    return plan


def with_model_of(resolved: Resolved, plan: Plan) -> Resolved:
    """Return the settings, with the model of a plan if they name none."""
    if resolved.settings.model.name:
        return resolved
    named = {"name": str(plan.provenance["model"]["name"])}
    model = resolved.settings.model.model_copy(update=named)
    return replace(resolved, settings=resolved.settings.model_copy(update={"model": model}))


def check_plan_file(
    path: Path, ratios: Sequence[float], allocators: Sequence[str], argument: str = "output"
) -> None:
    """Check before any work that a plan can be written to a file.

    Args:
        path: the file.
        ratios: the ratios of the plans.
        allocators: the allocators of the plans.
        argument: the argument that names the file.

    Raises:
        UsageError: several plans for one file, or the name does not end in ``.json``.
        OutputError: the file exists and is not a plan.
    """
    for given, key in ((ratios, "ratio"), (allocators, "allocator")):
        if len(given) > 1:
            raise UsageError(
                f"`{argument}` takes one plan, but {len(given)} {key}s were given.",
                f"Give one `plan.{key}`, or leave out `{argument}`.",
            )
    check_text_place(path, argument)
    if takes_text(path):
        return
    if path.suffix != ".json":
        raise UsageError(
            f"`{argument}={path}` does not end in .json.", "Name it plan.json, for example."
        )
    check_plan_output(path, overwrite=True, argument=argument)
