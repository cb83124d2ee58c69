"""How ranks are chosen."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import field_serializer

from hisvd_cli.pipelines.config.settings.fields import (
    ALLOCATOR_NAMES,
    MANY,
    Methods,
    Names,
    PresetName,
    Presets,
    Ratio,
    Ratios,
    Section,
    any_of,
    setting,
)

_ALLOCATORS = "Allocator options"


class PlanSettings(Section):
    """``[plan]``: how ranks are chosen."""

    ratio: Ratios = setting([0.8], "Share of the parameters to KEEP: 0.6 keeps 60 %.", basic=True)
    ratio_of: Literal["sublayers", "model"] = setting(
        "sublayers",
        "What the ratio refers to: the compressible linear layers (sublayers), or the whole "
        "model (model).",
    )
    bytes_ratio: Ratio | None = setting(
        None,
        "Share of the bytes of the linear layers to keep, instead of --ratio: waterfill selects "
        "rank and bits (16, 8 or 4) of every layer together.",
    )
    preset: Presets = setting(
        [],
        f"Combination of methods: {any_of(get_args(PresetName))}. Explicit options take "
        "precedence; compress accepts several.",
        basic=True,
    )
    allocator: Methods = setting(
        ["hisvd"],
        f"Rank allocation method: {any_of(ALLOCATOR_NAMES)}; plan compares several.",
        choices=ALLOCATOR_NAMES,
        basic=True,
    )
    metric: Literal["whitened", "fisher", "held-out", "weight"] = setting(
        "whitened",
        "How loss is measured: whitened (error of layer outputs), fisher (increase of the "
        "model's loss), held-out (fisher on text that the components were not fitted to) or "
        "weight (error of the weights).",
    )
    input_shrinkage: float = setting(
        0.02, "fisher: shrinkage of input moments towards their mean diagonal.", ge=0, le=1
    )
    output_shrinkage: float = setting(
        0.1, "fisher: shrinkage of gradient moments towards their mean diagonal.", ge=0, le=1
    )
    min_rank_ratio: float = setting(
        0.3, "Minimum rank, as a share of the rank under uniform allocation.", ge=0, lt=1
    )
    multiple_of: int = setting(1, "Round ranks to multiples of this.", ge=1, le=MANY)
    storage: Literal["pair", "pivoted"] = setting(
        "pair",
        "Storage of low-rank layers: pair (U and V), or pivoted (r rows of the product and the "
        "coefficients of the others; same product, fewer parameters, so higher rank).",
    )
    include: Names = setting(
        [], "Compress only layers that match this glob of a name or type.", basic=True
    )
    exclude: Names = setting(
        [], "Do not compress layers that match; they stay dense and are not counted."
    )
    rank_method: Literal["stable", "effective", "mathematical"] = setting(
        "stable",
        "hisvd: rank measure of stage 1: stable, effective or mathematical.",
        panel=_ALLOCATORS,
    )
    alpha: float = setting(
        0.5, "hisvd: exponent of the rank density in stage 1.", panel=_ALLOCATORS, ge=0, le=8
    )
    spectrum: Literal["whitened", "weight"] = setting(
        "weight",
        "hisvd: spectrum used by stage 1: whitened or weight.",
        panel=_ALLOCATORS,
    )
    modulation: Literal["logarithmic", "power", "exponential", "linear"] = setting(
        "logarithmic",
        "hisvd: form of the stage 2 factor: logarithmic, power, exponential or linear.",
        panel=_ALLOCATORS,
    )
    lwe_strength: float = setting(
        2.0,
        "hisvd: strength β of stage 2; 0 disables stage 2.",
        panel=_ALLOCATORS,
        ge=0,
        le=100,
    )
    tail_redundancy_weight: float = setting(
        30.0, "hisvd: weight of the tail share in stage 2.", panel=_ALLOCATORS, ge=0, le=100
    )
    selection: Literal["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"] = setting(
        "zero-sum",
        "zero-sum: which component is removed next: zero-sum, smallest, negative-sum, sigma or "
        "loss-order.",
        panel=_ALLOCATORS,
    )
    importance_weight: float = setting(
        0.6, "swift: weight of block importance.", panel=_ALLOCATORS, ge=0, le=1
    )
    sensitivity_ratios: Ratios = setting(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "asvd: keep ratios at which the sensitivity of each layer is measured.",
        panel=_ALLOCATORS,
    )
    probe_ratio: Ratio = setting(
        0.5, "lems: keep ratio at which each layer is measured.", panel=_ALLOCATORS
    )
    depth_factor: float = setting(
        5.0,
        "lems: the loss of the first block counts 1 plus this, falling linearly to 1 at the last.",
        panel=_ALLOCATORS,
        ge=0,
        le=100,
    )
    probe_samples: int = setting(
        8,
        "asvd, lems, learned: calibration windows used for the measurement.",
        panel=_ALLOCATORS,
        ge=1,
        le=MANY,
    )
    learning_start: Literal["uniform", "waterfill"] = setting(
        "waterfill",
        "learned: initial truncation positions: uniform or waterfill.",
        panel=_ALLOCATORS,
    )
    learning_steps: int = setting(
        40, "learned: gradient descent steps.", panel=_ALLOCATORS, ge=1, le=MANY
    )
    learning_rate: float = setting(
        0.01, "learned: step size, as a share of the full rank.", panel=_ALLOCATORS, gt=0, le=1
    )
    softness: float = setting(
        0.02,
        "learned: width of the soft mask, as a share of the full rank.",
        panel=_ALLOCATORS,
        gt=0,
        le=1,
    )

    @field_serializer("preset")
    def _one_or_several(self, preset: list[str]) -> str | list[str] | None:
        # Artifacts are made by one preset or by none, and record it as such.
        return preset if len(preset) > 1 else next(iter(preset), None)
