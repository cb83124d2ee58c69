"""Plans by bytes: ranks and bits chosen together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.budget import break_even, full_rank
from hisvd_cli.allocation.byte_budget import BITS, Candidate, Choice, choices, spend, stored_bytes
from hisvd_cli.allocation.byte_frontier import BUDGETS, frontier
from hisvd_cli.allocation.plan import Plan
from hisvd_cli.allocation.plans.rows import BytePlan
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.layers.shapes import Shape, numel
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import Sublayer, select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import PlanSettings, QuantizeSettings, Settings
from hisvd_cli.utils.errors import BudgetError, UsageError

ALLOCATOR = "waterfill"
"""The only allocator that chooses bits as well as ranks."""


def bytes_ratio(resolved: Resolved) -> float | None:
    """Return the bytes ratio to plan by, or None to plan by parameters.

    If one of the two ratios is a flag and the other is not, the flag counts.

    Raises:
        UsageError: both are flags or neither is, or other settings do not go with a bytes ratio.
    """
    knobs = resolved.settings.plan
    if knobs.bytes_ratio is None:
        return None
    if ("plan", "ratio") in resolved.origins:
        flags = resolved.is_flag("plan", "ratio"), resolved.is_flag("plan", "bytes_ratio")
        if flags[0] == flags[1]:
            raise UsageError(
                f"`plan.ratio` {knobs.ratio[0]:g} limits parameters and `plan.bytes_ratio` "
                f"{knobs.bytes_ratio:g} limits bytes; a plan has one limit.",
                "Leave out one of them.",
            )
        if flags[0]:
            return None
    _check_methods(resolved)
    return knobs.bytes_ratio


def _check_methods(resolved: Resolved) -> None:
    knobs = resolved.settings.plan
    if resolved.variants:
        raise UsageError(
            "`plan.bytes_ratio` makes one plan, but several presets are given: "
            f"{', '.join(knobs.preset)}.",
            "Give one `plan.preset`, or none.",
        )
    if ("plan", "allocator") in resolved.origins and knobs.allocator != [ALLOCATOR]:
        raise UsageError(
            f"`plan.allocator` {knobs.allocator[0]} chooses ranks only, so it cannot share a "
            "budget of bytes.",
            f"Leave it out, or use `plan.allocator` {ALLOCATOR} (as `plan.preset` best does).",
        )
    if resolved.is_flag("plan", "storage") and knobs.storage != "pair":
        raise UsageError(
            f"`plan.storage` {knobs.storage} cannot be quantized to few bits: rows computed from "
            "other rows amplify the rounding error.",
            "Leave it out: `plan.bytes_ratio` stores plain pairs.",
        )


def rounded_by(resolved: Resolved, plan: Plan) -> Resolved:
    """Return the settings, with the rounding method of a plan by bytes."""
    if plan.bytes is None:
        return resolved
    how = {"method": plan.bytes.method, "group_size": plan.bytes.group_size}
    quantize = resolved.settings.quantize.model_copy(update=how)
    return replace(resolved, settings=resolved.settings.model_copy(update={"quantize": quantize}))


@dataclass(frozen=True)
class ByteScope:
    """The byte budget of a plan, and the sublayers that share it.

    Attributes:
        ratio: the bytes ratio.
        knobs: the plan settings.
        sublayers: the planned sublayers.
        widths: bytes per weight of each, in the model.
        model: bytes of the whole model.
        rounds: quantization settings: rounding method, and group size of int4.
    """

    ratio: float
    knobs: PlanSettings
    sublayers: Sequence[Sublayer]
    widths: Sequence[int]
    model: int
    rounds: QuantizeSettings

    @property
    def group(self) -> int:
        """Number of inputs that share a scale, for int4."""
        return self.rounds.group_size

    @property
    def full(self) -> int:
        """Bytes of the sublayers, uncompressed."""
        return sum(numel(s.shape) * w for s, w in zip(self.sublayers, self.widths, strict=True))

    @property
    def rest(self) -> int:
        """Bytes of the uncompressed weights if the ratio counts the whole model; else 0."""
        return self.model - self.full if self.knobs.ratio_of == "model" else 0

    def budget(self, ratio: float) -> int:
        """Return the bytes available to all sublayers at a bytes ratio."""
        return int(ratio * (self.full + self.rest)) - self.rest

    def floor(self, shape: Shape) -> int:
        """Return the minimum rank of a sublayer: the rank of a uniform 16-bit budget, times
        ``min_rank_ratio``."""
        share = max(self.budget(self.ratio), 0) / self.full
        least = max(1, int(self.knobs.min_rank_ratio * share * break_even(shape)))
        step = self.knobs.multiple_of
        return min(-(-least // step) * step, full_rank(shape))

    def check(self) -> None:
        """Check before any work that the budget can be met. Raises BudgetError."""
        least = sum(
            min(
                stored_bytes(s.shape, rank, bits, self.group, width)
                for rank in (self.floor(s.shape), full_rank(s.shape))
                for bits in BITS
            )
            for s, width in zip(self.sublayers, self.widths, strict=True)
        )
        if least > self.budget(self.ratio):
            share = (least + self.rest) / (self.full + self.rest)
            raise BudgetError(
                f"Bytes ratio {self.ratio:g} cannot be met: the smallest ranks at 4 bits"
                f"{' and the uncompressed weights' if self.rest else ''} take {share:.3f}.",
                "Raise `plan.bytes_ratio`, or lower `plan.min_rank_ratio` or `plan.multiple_of`.",
            )

    def candidates(
        self, spectra: Sequence[Spectrum], roundings: Mapping[str, Mapping[int, Rounding]]
    ) -> list[Candidate]:
        """Return the candidates of each sublayer."""
        return [
            Candidate(
                s.shape,
                s.energy,
                s.of_weight,
                roundings.get(s.name, {}),
                self.floor(s.shape),
                width,
            )
            for s, width in zip(spectra, self.widths, strict=True)
        ]


def scope(ratio: float, settings: Settings, source: Source, anatomy: Anatomy) -> ByteScope:
    """Return the scope of a plan by bytes. Raises UsageError: a pattern matches nothing."""
    knobs = settings.plan
    sublayers = select(anatomy.sublayers, knobs.include, knobs.exclude)
    widths = [weight_width(source, anatomy, s) for s in sublayers]
    return ByteScope(ratio, knobs, sublayers, widths, source.weights.total_bytes, settings.quantize)


def weight_width(source: Source, anatomy: Anatomy, sublayer: Sublayer) -> int:
    """Return the bytes per weight of a sublayer in the model."""
    return int(source.weights.info(anatomy.names[f"{sublayer.members[0]}.weight"]).width)


def choose(
    of: ByteScope, spectra: Sequence[Spectrum], roundings: Mapping[str, Mapping[int, Rounding]]
) -> tuple[list[Choice], BytePlan]:
    """Return rank and bits of every sublayer within the budget, and the byte counts.

    Raises:
        BudgetError: the smallest choices exceed the budget.
    """
    candidates = of.candidates(spectra, roundings)
    step, budget = of.knobs.multiple_of, of.budget(of.ratio)
    made = spend([choices(c, BITS, of.group, step) for c in candidates], budget)
    budgets = {ratio: of.budget(ratio) for ratio in {*BUDGETS, of.ratio}}
    return made, BytePlan(
        ratio=of.ratio,
        budget=budget,
        kept=sum(choice.price for choice in made),
        full=of.full,
        model=of.model,
        method=of.rounds.method,
        group_size=of.group,
        frontier=frontier(candidates, budgets, of.group, step, of.rest),
    )
