"""How sublayers are factored, and what is written."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import (
    DECOMPOSER_NAMES,
    MANY,
    Section,
    any_of,
    setting,
)

_DECOMPOSERS = "Knobs of decomposers"
_CORRECTIONS = "Knobs of corrections"


class CompressSettings(Section):
    """``[compress]``: how sublayers are factored, and what is written."""

    decomposer: str = setting(
        "whitened",
        f"Method that factors a sublayer: {any_of(DECOMPOSER_NAMES)}.",
        choices=DECOMPOSER_NAMES,
    )
    solver: Literal["auto", "eigh", "svd", "partial", "subspace"] = setting(
        "auto",
        "How a decomposition finds its vectors: eigh (all of them), svd (the same, of the whitened "
        "matrix itself), partial (those that are kept), subspace (nearly those, at most 0.1 % "
        "above the least loss); auto picks by size, rank and device.",
    )
    update: Literal["none", "closed-form", "propagated"] = setting(
        "none",
        "Fit each sublayer to the inputs that the compressed model gives it: closed-form (U alone, "
        "SVD-LLM's update) or propagated (the weight, before it is truncated); none leaves it.",
    )
    update_damping: float | None = setting(
        None,
        "How far an update is held back, relative to the mean square of the inputs; by default "
        "chosen, for each group of sublayers, on a quarter of the windows that the fit leaves out.",
        ge=0,
        le=1e6,
    )
    max_shard_size: float = setting(5.0, "Largest weight file in GB.", gt=0, le=1e6)
    evaluate: bool | None = setting(
        None,
        "Measure perplexity before and after; by default only for the demo model.",
        decides=False,
    )
    stages: int = setting(
        1,
        "How often the model is truncated to the full ratio: between two stages it is multiplied "
        "out, corrected, and calibrated on the same text again.",
        ge=1,
        le=1000,
    )
    correction: Literal["pull-subspace", "project-to-delta", "alpha-blend", "gradient-step"] = (
        setting(
            "pull-subspace",
            "What stages add to a truncated weight: pull-subspace (the part of the way back that "
            "lies along the gradient of the loss), project-to-delta (the part of the gradient "
            "along the way back), alpha-blend (a share of the way back) or gradient-step.",
        )
    )
    correction_samples: int = setting(
        0,
        "Calibration windows whose gradients correct; 0 takes all.",
        panel=_CORRECTIONS,
        ge=0,
        le=MANY,
    )
    correction_batches: int = setting(
        1,
        "pull-subspace: into how many batches they are parted, each with a direction of its own.",
        panel=_CORRECTIONS,
        ge=1,
        le=MANY,
    )
    correction_alpha: float = setting(
        0.5, "alpha-blend: share of the way back to the original.", panel=_CORRECTIONS, gt=0, le=1
    )
    correction_step: float = setting(
        1e-4, "gradient-step: step against the gradient.", panel=_CORRECTIONS, gt=0, le=1e40
    )
    asvd_alpha: float = setting(
        0.5, "asvd: exponent of the mean absolute input.", panel=_DECOMPOSERS, ge=0, le=8
    )
    weighting: Literal["svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher"] = setting(
        "whitened",
        "randomized: whose weighting: svd, asvd, whitened, fwsvd, gfwsvd or fisher.",
        panel=_DECOMPOSERS,
    )
    oversamples: int = setting(
        10, "randomized: directions drawn beyond the rank.", panel=_DECOMPOSERS, ge=0, le=MANY
    )
    power_iterations: int = setting(
        2, "randomized: passes that sharpen the directions.", panel=_DECOMPOSERS, ge=0, le=1000
    )
