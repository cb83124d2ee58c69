"""Plans by one allocator at one ratio, or by one byte budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.budget import Budget, break_even, cost
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Probe
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.allocation.plan_assembly import ModelSize, assemble, by_bytes
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import Sublayer, select
from hisvd_cli.pipelines.config.settings import PlanSettings
from hisvd_cli.pipelines.planning.byte_budgets import ALLOCATOR as BYTE_ALLOCATOR
from hisvd_cli.pipelines.planning.byte_budgets import ByteScope, choose
from hisvd_cli.utils.errors import BudgetError
from hisvd_cli.utils.versions import versions


@dataclass(frozen=True)
class Planner:
    """The inputs that all plans of a run share."""

    knobs: PlanSettings
    spectra: Sequence[Spectrum]
    anatomy: Anatomy
    source: Source
    calibration: Calibration | None
    probe: Probe | None

    @property
    def sublayers(self) -> list[Sublayer]:
        """The planned sublayers."""
        return select(self.anatomy.sublayers, self.knobs.include, self.knobs.exclude)

    @property
    def tokens(self) -> int:
        """Tokens of the calibration; 1 without a calibration, since energies are sums then."""
        return int(self.calibration.manifest["data"]["tokens"]) if self.calibration else 1

    def plan(self, name: str, ratio: float) -> Plan:
        """Return the plan of one allocator at one ratio."""
        size = self.anatomy.size(self.knobs.include, self.knobs.exclude)
        budget = budget_of(ratio, self.knobs, self.sublayers, size)
        values = {**self.knobs.model_dump(), "probe": self.probe, "tokens": self.tokens}
        arguments = ALLOCATORS.arguments(name, values)
        allocation: Allocation = ALLOCATORS.get(name)(self.spectra, budget, **arguments)
        return self._assemble(name, allocation, budget.parameters, size, ratio)

    def plan_bytes(self, scope: ByteScope, roundings: Mapping[str, Mapping[int, Rounding]]) -> Plan:
        """Return the plan of ranks and bits within a byte budget."""
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

    def _active(self) -> dict[str, int]:
        """Return the record of the experts that a token passes; empty if there are none, or their
        number is unknown."""
        active, count = self.anatomy.active_parameters, self.anatomy.experts_per_token
        if active is None or count is None:
            return {}
        return {"active_parameters": active, "experts_per_token": count}

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
                    **self._active(),
                },
                "calibration": self.calibration.key if self.calibration else None,
                "versions": versions(),
            },
        )


def budget_of(
    ratio: float, knobs: PlanSettings, sublayers: Sequence[Sublayer], size: ModelSize
) -> Budget:
    """Return the parameter budget at a ratio. Raises BudgetError: it cannot be met."""
    parameters = size.budget(ratio, knobs.ratio_of)
    if parameters <= 0 and knobs.ratio_of == "model":
        rest = (size.total - size.sublayers) / size.total
        raise BudgetError(
            f"Ratio {ratio:g} of the whole model cannot be met: {rest:.1%} of its parameters are "
            "embeddings and others that are not compressed.",
            f"Use a ratio above {rest:.2f}, or `plan.ratio_of` sublayers.",
        )
    step, share = knobs.multiple_of, parameters / size.sublayers
    floors = []
    for s in sublayers:
        least = max(1, int(knobs.min_rank_ratio * share * break_even(s.shape)))
        floors.append(-(-least // step) * step)
    return Budget([s.shape for s in sublayers], parameters, floors, step, knobs.storage)
