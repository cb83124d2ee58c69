"""What timing a model found, at each batch size, beside its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hisvd_cli.evaluation.efficiency import PHASES, TimedWork, Timing, Versus, versus


@dataclass(frozen=True)
class Race:
    """A model at one batch size, and the baseline that it took turns with."""

    batch: int
    own: Timing
    baseline: Timing | None

    def versus(self) -> dict[str, Versus]:
        """Return the comparison by phase; nothing without a baseline."""
        if self.baseline is None:
            return {}
        return {phase: versus(self.own, self.baseline, phase) for phase in PHASES}


@dataclass(frozen=True)
class Speed:
    """A model's speed and memory, and under which conditions.

    Attributes:
        device: where it ran.
        dtype: its weights'.
        threads: of the CPU.
        compiled: whether ``torch.compile`` was timed.
        work: the prompts; their number is each race's.
        weight_bytes: all parameters.
        baseline_weight_bytes: those of the baseline, where there is one.
        races: one for each batch size.
    """

    device: str
    dtype: str
    threads: int
    compiled: bool
    work: TimedWork
    weight_bytes: int
    baseline_weight_bytes: int | None
    races: Sequence[Race]

    @property
    def conditions(self) -> str:
        """What ran where, in words."""
        work = f"{self.work.prompt} tokens of prompt, {self.work.new} new, {self.work.turns} turns"
        how = f"{self.dtype} on {self.device}"
        how += f", {self.threads} threads" if self.device == "cpu" else ""
        return f"{work}; {how}{', compiled' if self.compiled else ''}"

    def document(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "compiled": self.compiled,
            "prompt_tokens": self.work.prompt,
            "new_tokens": self.work.new,
            "turns": self.work.turns,
            "weight_bytes": self.weight_bytes,
            "baseline_weight_bytes": self.baseline_weight_bytes,
            "batches": [_race(each) for each in self.races],
        }

    def not_faster(self) -> list[str]:
        """Return where the model is not faster than its baseline for sure, in words."""
        return [
            f"{phase} at batch {race.batch}"
            for race in self.races
            for phase, each in race.versus().items()
            if each.verdict != "faster"
        ]


def _race(race: Race) -> dict[str, Any]:
    compared = {
        phase: {"speedup": each.speedup, "verdict": each.verdict}
        for phase, each in race.versus().items()
    }
    return {
        "batch": race.batch,
        "model": race.own.document(),
        "baseline": race.baseline.document() if race.baseline else None,
        "versus_baseline": compared or None,
    }
