"""Settings ─► plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.allocation.budget import Budget, break_even, cost
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Probe
from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.allocation.plan_assembly import ModelSize, assemble, by_bytes
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.factorize import check_plan
from hisvd_cli.linalg.statistics import Need, missing
from hisvd_cli.modeling.skeleton import tell_notes
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sublayers import Sublayer, select
from hisvd_cli.pipelines.calibration import find_calibration, named_source, require_calibration
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import PlanSettings, Settings
from hisvd_cli.pipelines.memory.bounds import check_factoring
from hisvd_cli.pipelines.memory.whole_models import check_measuring
from hisvd_cli.pipelines.outputs import check_plan_output
from hisvd_cli.pipelines.planning.byte_budgets import ALLOCATOR as BYTE_ALLOCATOR
from hisvd_cli.pipelines.planning.byte_budgets import ByteScope, bytes_ratio, choose
from hisvd_cli.pipelines.planning.byte_budgets import scope as byte_scope
from hisvd_cli.pipelines.planning.methods import measures, method_that_needs, plan_needs
from hisvd_cli.pipelines.planning.probes import open_probe
from hisvd_cli.pipelines.planning.spectra import find_roundings, find_spectra
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import BudgetError, UsageError
from hisvd_cli.utils.files.text_output import check_text_place, takes_text
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.registry import accepted
from hisvd_cli.utils.versions import versions


def plan_model(resolved: Resolved, reporter: Reporter) -> list[Plan]:
    """Plan the model of the settings at each of their ratios, from its calibration where there is
    one and from its weights alone where there is none.

    Raises:
        UsageError, BudgetError: see :func:`check_knobs`.
        SourceError: a calibration is named, but not there.
    """
    source = named_source(resolved)
    tell_notes(source, reporter)
    check_knobs(resolved, source)
    check_planning_memory(resolved, source)
    named = resolved.settings.calibration.path is not None
    find = require_calibration if named else find_calibration
    calibration = world().agreed(lambda: find(resolved, source, reporter))
    if calibration is None:
        reporter.warn(
            f"{source.name} is not calibrated with these settings: planned from its weights alone."
        )
    return make_plans(resolved, source, calibration, reporter)


def check_sublayers(resolved: Resolved, patterns: Sequence[str]) -> None:
    """Find out before any work whether patterns match planned sublayers. Raises UsageError."""
    _chosen(resolved, dissect(named_source(resolved)), patterns)


def sublayer_spectra(
    resolved: Resolved, patterns: Sequence[str], reporter: Reporter
) -> list[Spectrum]:
    """Return the spectra that a plan looks at, of the sublayers that match a pattern.

    Raises:
        UsageError: a pattern that matches nothing.
    """
    source = named_source(resolved)
    anatomy = dissect(source)
    names = _chosen(resolved, anatomy, patterns)
    calibration = find_calibration(resolved, source, reporter)
    spectra = find_spectra(resolved, source, anatomy, calibration, reporter)
    return [s for s in spectra if s.name in names]


def _chosen(resolved: Resolved, anatomy: Anatomy, patterns: Sequence[str]) -> set[str]:
    knobs = resolved.settings.plan
    planned = select(anatomy.sublayers, knobs.include, knobs.exclude)
    return {s.name for s in select(planned, patterns, [])}


def check_plan_file(path: Path, ratios: Sequence[float], allocators: Sequence[str]) -> None:
    """Refuse a file that a plan cannot go to, before any work.

    Raises:
        UsageError: several plans for one file, or a name that is no ``.json``.
        OutputError: something else than a plan stands there.
    """
    for given, flag in ((ratios, "ratio"), (allocators, "allocator")):
        if len(given) > 1:
            raise UsageError(
                f"--output takes one plan, but {len(given)} {flag}s were given.",
                f"Give one --{flag}, or use --json.",
            )
    check_text_place(path, "--output")
    if takes_text(path):
        return
    if path.suffix != ".json":
        raise UsageError(f"--output {path} does not end in .json.", "Name it plan.json, say.")
    check_plan_output(path, overwrite=True)


def open_plan(path: Path, source: Source) -> Plan:
    """Read a plan that was made for ``source``.

    Raises:
        SourceError: no plan there.
        StaleArtifactError: it was made for another model.
    """
    plan = load_plan(path)
    check_plan(plan, source)
    return plan


def check_knobs(resolved: Resolved, source: Source) -> None:
    """Find out before any work whether the settings can be planned at all.

    Raises:
        UsageError: several presets, an unknown allocator, or a pattern that matches nothing.
        BudgetError: a ratio that cannot be met.
    """
    knobs = resolved.settings.plan
    if resolved.variants:
        raise UsageError(
            f"Several presets are set: {', '.join(knobs.preset)}; only compress makes several.",
            "Give one --preset, or several --allocator.",
        )
    for name in knobs.allocator:
        ALLOCATORS.get(name)
    anatomy = dissect(source)
    if (ratio := bytes_ratio(resolved)) is not None:
        byte_scope(ratio, resolved.settings, source, anatomy).check()
        return
    chosen = select(anatomy.sublayers, knobs.include, knobs.exclude)
    for ratio in knobs.ratio:
        _budget(ratio, knobs, chosen, anatomy.size(knobs.include, knobs.exclude))


def check_planning_memory(resolved: Resolved, source: Source) -> None:
    """Find out before any work whether spectra, and what allocators measure, fit into the bound.

    Raises:
        UsageError, MemoryLimitError: as of :mod:`hisvd_cli.pipelines.memory.bounds`.
    """
    check_factoring(resolved, source)
    for name in filter(measures, resolved.settings.plan.allocator):
        check_measuring(resolved, source, name)


def make_plans(
    resolved: Resolved,
    source: Source,
    calibration: Calibration | None,
    reporter: Reporter,
    ratios: Sequence[float] | None = None,
) -> list[Plan]:
    """Plan a model by each allocator of the settings, at each of their ratios (or of ``ratios``).

    Raises:
        UsageError: an unknown allocator, or a pattern that matches nothing.
        SourceError: a method needs statistics that were not taken; names the command.
        BudgetError: the ratio cannot be met.
    """
    check_statistics(resolved.settings, calibration)
    if calibration and "gradients" in calibration.holds and resolved.uses_defaults("plan"):
        reporter.suggest("This calibration holds gradients; --preset best makes use of them.")
    anatomy = dissect(source)
    knobs = resolved.settings.plan
    share = bytes_ratio(resolved)
    planner = _Planner(
        knobs=knobs,
        spectra=find_spectra(resolved, source, anatomy, calibration, reporter),
        sublayers=select(anatomy.sublayers, knobs.include, knobs.exclude),
        anatomy=anatomy,
        source=source,
        calibration=calibration,
        probe=open_probe(resolved, source, anatomy, calibration, reporter)
        if world().first and share is None
        else None,
    )
    if share is not None:
        scope = byte_scope(share, resolved.settings, source, anatomy)
        roundings = find_roundings(resolved, source, anatomy, calibration, reporter)
        return world().agreed(lambda: [planner.plan_bytes(scope, roundings)])
    # By one process alone: some allocators measure the model on the way.
    return world().agreed(
        lambda: [
            planner.plan(allocator, ratio)
            for allocator in knobs.allocator
            for ratio in ratios or knobs.ratio
        ]
    )


def check_statistics(settings: Settings, calibration: Calibration | None) -> None:
    """Refuse to plan by methods whose statistics were not taken; from the weights alone, whitened
    means weight.

    Raises:
        SourceError: names the method and the command.
        UsageError: an unknown allocator.
    """
    holds = calibration.holds if calibration else frozenset[Need]({"moments"})
    for need in plan_needs(settings) - holds:
        raise missing(method_that_needs(settings, need), need)


@dataclass(frozen=True)
class _Planner:
    """What all plans of one run share."""

    knobs: PlanSettings
    spectra: Sequence[Spectrum]
    sublayers: Sequence[Sublayer]
    anatomy: Anatomy
    source: Source
    calibration: Calibration | None
    probe: Probe | None

    @property
    def tokens(self) -> int:
        """Tokens of the calibration; 1 without one, where energies are sums already."""
        return int(self.calibration.manifest["data"]["tokens"]) if self.calibration else 1

    def plan(self, name: str, ratio: float) -> Plan:
        """Return the plan of one allocator at one ratio."""
        size = self.anatomy.size(self.knobs.include, self.knobs.exclude)
        budget = _budget(ratio, self.knobs, self.sublayers, size)
        allocator = ALLOCATORS.get(name)
        values = {**self.knobs.model_dump(), "probe": self.probe, "tokens": self.tokens}
        allocation: Allocation = allocator(self.spectra, budget, **accepted(allocator, values))
        return self._assemble(name, allocation, budget.parameters, size, ratio)

    def plan_bytes(self, scope: ByteScope, roundings: Mapping[str, Mapping[int, Rounding]]) -> Plan:
        """Return the plan of ranks and bits together, within a budget of bytes."""
        size = self.anatomy.size(self.knobs.include, self.knobs.exclude)
        chosen, counted = choose(scope, self.spectra, roundings)
        ranks = [choice.rank for choice in chosen]
        pairs = zip(ranks, (s.shape for s in self.spectra), strict=True)
        kept = sum(int(cost(rank, shape)) for rank, shape in pairs)
        plan = self._assemble(
            BYTE_ALLOCATOR,
            Allocation(ranks, list(ranks)),
            kept,
            size,
            kept / size.sublayers,
            storage="pair",
            bytes_ratio=scope.ratio,
        )
        return by_bytes(plan, chosen, counted)

    def _assemble(
        self,
        name: str,
        allocation: Allocation,
        parameters: int,
        size: ModelSize,
        ratio: float,
        **settings: Any,
    ) -> Plan:
        recorded = self.knobs.model_dump(mode="json")
        recorded |= {"allocator": name, "ratio": ratio, "bytes_ratio": None}
        return assemble(
            ratio=ratio,
            allocator=name,
            allocation=allocation,
            spectra=self.spectra,
            layers=[s.layer for s in self.sublayers],
            size=size,
            budget_parameters=parameters,
            settings={**recorded, **settings},
            provenance={
                "model": {
                    "name": self.source.name,
                    "revision": self.source.revision,
                    "fingerprint": self.source.original.fingerprint,
                    "parameters": size.total,
                },
                "calibration": self.calibration.key if self.calibration else None,
                "versions": versions(),
            },
        )


def _budget(
    ratio: float, knobs: PlanSettings, sublayers: Sequence[Sublayer], size: ModelSize
) -> Budget:
    parameters = size.budget(ratio, knobs.ratio_of)
    if parameters <= 0:
        rest = (size.total - size.sublayers) / size.total
        raise BudgetError(
            f"Ratio {ratio:g} of the whole model cannot be met: {rest:.1%} of it are embeddings "
            "and other parameters that stay.",
            f"Use a ratio above {rest:.2f}, or --ratio-of sublayers.",
        )
    step, share = knobs.multiple_of, parameters / size.sublayers
    floors = []
    for s in sublayers:
        least = max(1, int(knobs.min_rank_ratio * share * break_even(s.shape)))
        floors.append(-(-least // step) * step)
    return Budget([s.shape for s in sublayers], parameters, floors, step, knobs.storage)
