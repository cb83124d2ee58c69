"""Speed results of a model and its baseline at each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hisvd_cli.evaluation.efficiency import PHASES, TimedWork, Timing, Versus, versus
from hisvd_cli.utils.quantities import counted


@dataclass(frozen=True)
class BatchSpeed:
    """The timings at one batch size of a model and of the baseline it alternated with."""

    batch: int
    own: Timing
    baseline: Timing | None

    def versus(self) -> dict[str, Versus]:
        """Return the comparison by phase; empty without a baseline."""
        if self.baseline is None:
            return {}
        return {phase: versus(self.own, self.baseline, phase) for phase in PHASES}


@dataclass(frozen=True)
class Speed:
    """Speed and memory of a model, with the conditions of the measurement.

    Attributes:
        device: the device.
        dtype: dtype of the weights.
        threads: number of CPU threads.
        compiled: whether the model ran under ``torch.compile``.
        work: the workload; ``speeds`` give the batch sizes.
        weight_bytes: bytes of all parameters.
        baseline_weight_bytes: the same of the baseline; None without one.
        speeds: one for each batch size.
    """

    device: str
    dtype: str
    threads: int
    compiled: bool
    work: TimedWork
    weight_bytes: int
    baseline_weight_bytes: int | None
    speeds: Sequence[BatchSpeed]

    @property
    def conditions(self) -> str:
        """The conditions of the measurement, in words."""
        work = f"{counted(self.work.prompt, 'prompt token')}, {counted(self.work.new, 'new token')}"
        work += f", {counted(self.work.turns, 'repetition')}"
        how = f"{self.dtype} on {self.device}"
        how += f", {counted(self.threads, 'thread')}" if self.device == "cpu" else ""
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
            "batches": [_batch_document(each) for each in self.speeds],
        }

    def not_faster(self) -> list[str]:
        """Return the phases and batch sizes at which the model is not faster in every run."""
        return [
            f"{phase} at batch {at_batch.batch}"
            for at_batch in self.speeds
            for phase, each in at_batch.versus().items()
            if each.verdict != "faster"
        ]


def _batch_document(at_batch: BatchSpeed) -> dict[str, Any]:
    compared = {
        phase: {"speedup": each.speedup, "verdict": each.verdict}
        for phase, each in at_batch.versus().items()
    }
    return {
        "batch": at_batch.batch,
        "model": at_batch.own.document(),
        "baseline": at_batch.baseline.document() if at_batch.baseline else None,
        "versus_baseline": compared or None,
    }
