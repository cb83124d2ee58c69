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

_ALLOCATORS = "Knobs of allocators"


class PlanSettings(Section):
    """``[plan]``: how ranks are chosen."""

    ratio: Ratios = setting([0.8], "Share of the parameters to KEEP: 0.6 keeps 60 %.")
    ratio_of: Literal["sublayers", "model"] = setting(
        "sublayers", "What the ratio counts: the factored sublayers, or the whole model."
    )
    bytes_ratio: Ratio | None = setting(
        None,
        "Instead of --ratio, share of the sublayers' bytes to keep: rank and bits (16, 8 or 4) are "
        "chosen together, by waterfill, and stored as quantized plain pairs or matrices.",
    )
    preset: Presets = setting(
        [],
        f"Named combination of methods: {any_of(get_args(PresetName))}. Settings given beside it "
        "win; compress makes several.",
    )
    allocator: Methods = setting(
        ["hisvd"],
        f"Method that shares the budget: {any_of(ALLOCATOR_NAMES)}; plan shows several side by "
        "side.",
        choices=ALLOCATOR_NAMES,
    )
    metric: Literal["whitened", "fisher", "held-out", "weight"] = setting(
        "whitened",
        "In which metric loss is counted: whitened (error of the outputs), fisher (growth of the "
        "model's loss), held-out (the same, on text that the components were not chosen on) or "
        "weight (error of the weights).",
    )
    input_shrinkage: float = setting(
        0.02, "fisher: how far moments of inputs move towards their mean diagonal.", ge=0, le=1
    )
    output_shrinkage: float = setting(0.1, "fisher: the same for moments of gradients.", ge=0, le=1)
    min_rank_ratio: float = setting(
        0.3, "Smallest rank, as a share of what equal shares would give.", ge=0, lt=1
    )
    multiple_of: int = setting(1, "Ranks are multiples of this.", ge=1, le=MANY)
    storage: Literal["pair", "pivoted"] = setting(
        "pair",
        "How a low-rank pair is written: pair (U and V), or pivoted (r rows of the product, and "
        "what makes the others of them: the same product in fewer numbers, so more rank).",
    )
    include: Names = setting([], "Only sublayers that match this glob of a name or type.")
    exclude: Names = setting([], "No sublayers that match; they stay dense and uncounted.")
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
        "hisvd: spectrum that stage 1 measures: whitened or weight.",
        panel=_ALLOCATORS,
    )
    modulation: Literal["logarithmic", "power", "exponential", "linear"] = setting(
        "logarithmic",
        "hisvd: form of stage 2's factor: logarithmic, power, exponential or linear.",
        panel=_ALLOCATORS,
    )
    lwe_strength: float = setting(
        2.0,
        "hisvd: strength β of stage 2; 0 leaves stage 1 as it is.",
        panel=_ALLOCATORS,
        ge=0,
        le=100,
    )
    tail_redundancy_weight: float = setting(
        30.0, "hisvd: weight of the tail share in stage 2.", panel=_ALLOCATORS, ge=0, le=100
    )
    selection: Literal["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"] = setting(
        "zero-sum",
        "zero-sum: which component goes next: zero-sum, smallest, negative-sum, sigma or "
        "loss-order.",
        panel=_ALLOCATORS,
    )
    importance_weight: float = setting(
        0.6, "swift: how much a block's importance counts.", panel=_ALLOCATORS, ge=0, le=1
    )
    sensitivity_ratios: Ratios = setting(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "asvd: kept shares at which each sublayer is measured.",
        panel=_ALLOCATORS,
    )
    probe_ratio: Ratio = setting(
        0.5, "lems: kept share at which each sublayer is measured.", panel=_ALLOCATORS
    )
    depth_factor: float = setting(
        5.0,
        "lems: the first block's loss counts 1 plus this, falling evenly to 1 at the last.",
        panel=_ALLOCATORS,
        ge=0,
        le=100,
    )
    probe_samples: int = setting(
        8,
        "asvd, lems, learned: windows of calibration text to measure on.",
        panel=_ALLOCATORS,
        ge=1,
        le=MANY,
    )
    learning_start: Literal["uniform", "waterfill"] = setting(
        "waterfill", "learned: where positions start: uniform or waterfill.", panel=_ALLOCATORS
    )
    learning_steps: int = setting(
        40, "learned: steps of gradient descent.", panel=_ALLOCATORS, ge=1, le=MANY
    )
    learning_rate: float = setting(
        0.01, "learned: size of a step, as a share of the full rank.", panel=_ALLOCATORS, gt=0, le=1
    )
    softness: float = setting(
        0.02,
        "learned: width of a soft mask's edge, as a share of the full rank.",
        panel=_ALLOCATORS,
        gt=0,
        le=1,
    )

    @field_serializer("preset")
    def _one_or_several(self, preset: list[str]) -> str | list[str] | None:
        # Artifacts are made by one preset or by none, and record it as such.
        return preset if len(preset) > 1 else next(iter(preset), None)
