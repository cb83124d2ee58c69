"""Settings of factorization and output."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import (
    DECOMPOSER_NAMES,
    Section,
    any_of,
    setting,
)
from hisvd_cli.utils.registry import MANY

_CORRECTIONS = "Correction options"


class CompressSettings(Section):
    """``[compress]``: factorization and output. The options of decomposers are added to it."""

    decomposer: str = setting(
        "whitened",
        f"Factorization method: {any_of(DECOMPOSER_NAMES)}.",
        choices=DECOMPOSER_NAMES,
    )
    solver: Literal["auto", "eigh", "svd", "partial", "subspace"] = setting(
        "auto",
        "How singular vectors are computed: eigh (all eigenvectors), svd (SVD of the whitened "
        "matrix), partial (only those that are kept), subspace (block iteration, loss within 0.1 "
        "%); auto selects by size, rank and device.",
    )
    update: Literal["none", "closed-form", "propagated"] = setting(
        "none",
        "Fit each layer to the inputs it receives in the compressed model: closed-form (U only, "
        "as in SVD-LLM), propagated (the weight, before truncation), or none.",
    )
    update_damping: float | None = setting(
        None,
        "Damping of an update, relative to the mean square of the inputs; default: selected per "
        "group of layers on a held-out quarter of the windows.",
        ge=0,
        le=1e6,
    )
    max_shard_size: float = setting(5.0, "Maximum size of a weight file, in GB.", gt=0, le=1e6)
    evaluate: bool | None = setting(
        None,
        "Measure perplexity before and after; default: only for the demo model.",
        decides=False,
        basic=True,
    )
    stages: int = setting(
        1,
        "Number of truncate-and-correct rounds: between rounds the model is multiplied out, "
        "corrected and calibrated again on the same text.",
        ge=1,
        le=1000,
    )
    correction: Literal["pull-subspace", "project-to-delta", "alpha-blend", "gradient-step"] = (
        setting(
            "pull-subspace",
            "Correction between rounds: pull-subspace (projection of the residual onto the "
            "gradient), project-to-delta (projection of the gradient onto the residual), "
            "alpha-blend (a share of the residual) or gradient-step.",
        )
    )
    correction_samples: int = setting(
        0,
        "Calibration windows used for correction gradients; 0 uses all.",
        panel=_CORRECTIONS,
        ge=0,
        le=MANY,
    )
    correction_batches: int = setting(
        1,
        "pull-subspace: number of batches, each with its own gradient direction.",
        panel=_CORRECTIONS,
        ge=1,
        le=MANY,
    )
    correction_alpha: float = setting(
        0.5, "alpha-blend: share of the residual that is added.", panel=_CORRECTIONS, gt=0, le=1
    )
    correction_step: float = setting(
        1e-4, "gradient-step: step size.", panel=_CORRECTIONS, gt=0, le=1e40
    )
