"""Settings ─► plans by bytes: ranks and bits chosen together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.budget import break_even, full_rank
from hisvd_cli.allocation.byte_budget import BITS, Candidate, Choice, choices, spend, stored_bytes
from hisvd_cli.allocation.byte_frontier import BUDGETS, frontier
from hisvd_cli.allocation.plan import BytePlan, Plan
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sublayers import Shape, Sublayer, select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import PlanSettings, QuantizeSettings, Settings
from hisvd_cli.utils.errors import BudgetError, UsageError

ALLOCATOR = "waterfill"
"""The method whose rule chooses rank and bits; others know no losses of bits."""


def bytes_ratio(resolved: Resolved) -> float | None:
    """Return the bytes ratio to plan by; None where the plan is by parameters.

    Of a ratio and a bytes ratio, that of the command line counts.

    Raises:
        UsageError: both were given in the same kind of place, or settings that go with parameters
            only.
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
    """Return settings that round as a plan by bytes counts; others as they are."""
    if plan.bytes is None:
        return resolved
    how = {"method": plan.bytes.method, "group_size": plan.bytes.group_size}
    quantize = resolved.settings.quantize.model_copy(update=how)
    return replace(resolved, settings=resolved.settings.model_copy(update={"quantize": quantize}))


@dataclass(frozen=True)
class ByteScope:
    """What a plan by bytes may spend, and on what.

    Attributes:
        ratio: the bytes ratio.
        knobs: the plan's settings.
        sublayers: those that it covers.
        widths: bytes of a number of each in the model.
        model: bytes of the whole model.
        rounds: how numbers are rounded, and in which groups those of 4 bits.
    """

    ratio: float
    knobs: PlanSettings
    sublayers: Sequence[Sublayer]
    widths: Sequence[int]
    model: int
    rounds: QuantizeSettings

    @property
    def group(self) -> int:
        """Numbers that share a scale, with 4 bits."""
        return self.rounds.group_size

    @property
    def full(self) -> int:
        """Bytes of the sublayers in the model."""
        return sum(prod(s.shape) * w for s, w in zip(self.sublayers, self.widths, strict=True))

    @property
    def rest(self) -> int:
        """Bytes of what stays as it is, where the ratio counts that too; else 0."""
        return self.model - self.full if self.knobs.ratio_of == "model" else 0

    def budget(self, ratio: float) -> int:
        """Return the bytes that all sublayers may take at a bytes ratio."""
        return int(ratio * (self.full + self.rest)) - self.rest

    def floor(self, shape: Shape) -> int:
        """Return the smallest rank of a sublayer: what equal shares of 16 bits would give, times
        the settings' share of that."""
        share = max(self.budget(self.ratio), 0) / self.full
        least = max(1, int(self.knobs.min_rank_ratio * share * break_even(shape)))
        step = self.knobs.multiple_of
        return min(-(-least // step) * step, full_rank(shape))

    def check(self) -> None:
        """Refuse a budget that no choice keeps to, before any work. Raises BudgetError."""
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
        """Return what the choice is made from, of each sublayer."""
        return [
            Candidate(s.shape, s.energy, s.of_weight, roundings[s.name], self.floor(s.shape), width)
            for s, width in zip(spectra, self.widths, strict=True)
        ]


def scope(ratio: float, settings: Settings, source: Source, anatomy: Anatomy) -> ByteScope:
    """Find out what a plan by bytes covers. Raises UsageError: a pattern that matches nothing."""
    knobs = settings.plan
    sublayers = select(anatomy.sublayers, knobs.include, knobs.exclude)
    infos = source.weights.infos
    widths = [infos[anatomy.names[f"{s.name}.weight"]].nbytes // prod(s.shape) for s in sublayers]
    return ByteScope(ratio, knobs, sublayers, widths, source.weights.total_bytes, settings.quantize)


def choose(
    of: ByteScope, spectra: Sequence[Spectrum], roundings: Mapping[str, Mapping[int, Rounding]]
) -> tuple[list[Choice], BytePlan]:
    """Return rank and bits of every sublayer within the bytes, and what they count.

    Raises:
        BudgetError: the smallest choices take more.
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
