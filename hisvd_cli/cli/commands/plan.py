"""``hisvd plan``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hisvd_cli.cli.options import DryRun, Run, option, with_settings
from hisvd_cli.pipelines.config.commands import SETTINGS, Key
from hisvd_cli.pipelines.config.settings import methods_of

if TYPE_CHECKING:
    from hisvd_cli.allocation.plan import Plan


@with_settings(SETTINGS["plan"], together=True)
def plan(
    run: Run,
    output: Annotated[
        Path | None,
        option("--output", "-o", text="Write the plan to this .json file.", metavar="FILE"),
    ] = None,
    tables: Annotated[
        bool, option("--tables", text="When comparing plans, also show all ranks of each.")
    ] = False,
    spectrum_of: Annotated[
        list[str] | None,
        option(
            "--spectrum-of",
            text="Draw the spectra of layers that match this glob of a name or type (repeatable).",
            metavar="GLOB",
        ),
    ] = None,
    list_profiles: Annotated[
        bool,
        option(
            "--list-profiles",
            text="List the shipped profiles with the published figures, and exit.",
        ),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Show the rank of every layer before any decomposition.

    Uses the calibration of the model if there is one, otherwise the weights alone.

    Examples: hisvd plan --model demo --ratio 0.8 --ratio 0.6

    hisvd plan --model demo --allocator hisvd --allocator uniform
    """
    run.console.needs_stdout(output)
    if list_profiles:
        _list_profiles(run)
        return
    from hisvd_cli.cli.views.plans import comparison_view, plan_forecast_view, plan_view
    from hisvd_cli.pipelines.forecasts.planning import forecast_plan
    from hisvd_cli.pipelines.output_names import output_name
    from hisvd_cli.pipelines.planning.byte_budgets import bytes_ratio
    from hisvd_cli.pipelines.planning.plan_files import check_plan_file
    from hisvd_cli.pipelines.planning.plans import plan_model
    from hisvd_cli.pipelines.planning.sublayer_spectra import check_sublayers
    from hisvd_cli.pipelines.unused_options import check_options

    check_options(run.resolved, "plan")
    if dry_run:
        forecast = forecast_plan(run.resolved)
        run.show_forecast(forecast, plan_forecast_view(forecast))
        return
    chosen = run.settings.plan
    if output is not None:
        output = output_name(output)
        ratios = chosen.ratio if bytes_ratio(run.resolved) is None else chosen.ratio[:1]
        check_plan_file(output, ratios, chosen.allocator)
    if spectrum_of:
        check_sublayers(run.resolved, spectrum_of)
    plans = plan_model(run.resolved, run.console)
    compared = len(chosen.allocator) > 1
    for made in plans if tables or not compared else ():
        run.console.show(plan_view(made, run.console.width, run.console.verbose))
    if compared:
        run.console.show(comparison_view(plans, run.console.width))
    if output is not None and run.first:
        plans[0].save(output)
    documents = [made.document() for made in plans]
    document = documents[0] if len(documents) == 1 else {"plans": documents}
    if spectrum_of:
        document = {**document, "spectra": _show_spectra(run, plans, spectrum_of)}
    run.console.result(document, " ".join(f"{made.model_ratio:.4f}" for made in plans))
    run.console.next_command(_next_command(run, plans[0], output))


def _list_profiles(run: Run) -> None:
    from hisvd_cli.cli.views.profiles import profiles_view
    from hisvd_cli.pipelines.config.shipped import shipped_profiles

    profiles = shipped_profiles()
    run.console.show(profiles_view(profiles))
    document = {"profiles": [profile.document() for profile in profiles]}
    run.console.result(document, " ".join(profile.name for profile in profiles))


def _show_spectra(run: Run, plans: Sequence[Plan], patterns: list[str]) -> list[dict[str, Any]]:
    """Show the matching spectra and return them as JSON data."""
    from hisvd_cli.cli.views.plans import spectra_view
    from hisvd_cli.pipelines.planning.sublayer_spectra import sublayer_spectra
    from hisvd_cli.utils.progress import Silent

    spectra = sublayer_spectra(run.resolved, patterns, Silent())  # notes were shown by the plan
    for made in plans:
        run.console.show(spectra_view(spectra, made, run.console.width))
    return [{"name": s.name, "energy": s.energy.tolist()} for s in spectra]


def _next_command(run: Run, plan: Plan, output: Path | None) -> str:
    """Return the command that compresses by a plan, given its file or its settings."""
    from hisvd_cli.utils.files.fingerprints import ratio_name

    flags = run.resolved.flags("model", "calibration")
    if output is not None and output.is_file():
        # The file includes the plan settings of a preset, which compress does not accept with it.
        factoring = run.resolved.flags("compress", expanded=True)
        return f"hisvd compress {flags} --plan {shlex.quote(str(output))} {factoring}"
    one_each = [("plan", "ratio"), ("plan", "allocator")]
    several = run.settings.plan.allocator[1:]
    dropped = [*(one_each if several else one_each[:1]), *_of_others(plan.allocator)]
    options = run.resolved.flags("plan", "compress", "quantize", without=dropped)
    if plan.bytes is not None:
        return f"hisvd compress {flags} {options}"
    allocator = f"--allocator {shlex.quote(plan.allocator)} " if several else ""
    return f"hisvd compress {flags} --ratio {ratio_name(plan.ratio)} {allocator}{options}"


def _of_others(allocator: str) -> list[Key]:
    """Return the options of other allocators, which compress does not accept with this one."""
    keys = ((key, methods_of(*key)) for key in SETTINGS["plan"] if key[0] == "plan")
    return [key for key, methods in keys if methods and allocator not in methods]
