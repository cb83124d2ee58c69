"""The result of a compression: plan, sizes and times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.evaluation.perplexity import PerplexityResult


@dataclass(frozen=True)
class Outcome:
    """A finished compression.

    Attributes:
        output: the checkpoint, a folder or a ``.pt`` file.
        plan: its plan.
        plan_path: a file with the plan.
        bytes: size of the weights.
        dense_bytes: size of the original weights.
        seconds: time of each step.
        peak_memory_bytes: peak memory of the process.
        perplexity: before and after compression, if it was measured.
        dtype: dtype of the forward passes.
        stored_dtype: dtype of the weights.
    """

    output: Path
    plan: Plan
    plan_path: Path
    bytes: int
    dense_bytes: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    perplexity: tuple[PerplexityResult, PerplexityResult] | None
    dtype: str
    stored_dtype: str

    @property
    def dense_parameters(self) -> int | None:
        """Parameters of the original model; None if an old plan does not record them."""
        return self.plan.model_parameters

    @property
    def parameters(self) -> int | None:
        """Parameters of the compressed model."""
        total = self.plan.model_parameters
        return total and total - self.plan.full_parameters + self.plan.kept_parameters

    def document(self) -> dict[str, Any]:
        """Return the outcome as JSON data."""
        perplexity = None
        if self.perplexity is not None:
            before, after = self.perplexity
            perplexity = {"before": before.perplexity, "after": after.perplexity}
        return {
            "output": str(self.output),
            "ratio": self.plan.ratio,
            "model_ratio": self.plan.model_ratio,
            "kept_parameters": self.plan.kept_parameters,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "plan": str(self.plan_path),
            "perplexity": perplexity,
            "dtype": self.dtype,
            "stored_dtype": self.stored_dtype,
        }
