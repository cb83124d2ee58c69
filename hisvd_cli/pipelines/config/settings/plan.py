"""Settings of rank allocation."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import field_serializer

from hisvd_cli.pipelines.config.settings.fields import (
    ALLOCATOR_NAMES,
    Methods,
    Names,
    PresetName,
    Presets,
    Section,
    any_of,
    setting,
)
from hisvd_cli.utils.registry import MANY, Ratio, Ratios

ALLOCATOR_PANEL = "Allocator options"


class PlanSettings(Section):
    """``[plan]``: rank allocation. The options of allocators are added to it."""

    ratio: Ratios = setting([0.8], "Share of the parameters to KEEP: 0.6 keeps 60 %.", basic=True)
    ratio_of: Literal["sublayers", "model"] = setting(
        "sublayers",
        "What the ratio refers to: the compressible linear layers (sublayers), or the whole "
        "model (model).",
    )
    bytes_ratio: Ratio | None = setting(
        None,
        "Share of the bytes of the linear layers to keep, instead of `plan.ratio`: waterfill "
        "selects "
        "rank and bits (16, 8 or 4) of every layer together.",
    )
    preset: Presets = setting(
        [],
        f"Combination of methods: {any_of(get_args(PresetName))}. Explicit options take "
        "precedence.",
        basic=True,
    )
    allocator: Methods = setting(
        ["hisvd"],
        f"Rank allocation method: {any_of(ALLOCATOR_NAMES)}.",
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
        [],
        "Compress only layers that match this glob of a name or type.",
        basic=True,
        metavar="GLOB",
    )
    exclude: Names = setting(
        [],
        "Do not compress layers that match; they stay dense and are not counted.",
        metavar="GLOB",
    )
    probe_samples: int = setting(
        8,
        "Calibration windows for allocators that measure the model (asvd, lems, learned).",
        panel=ALLOCATOR_PANEL,
        ge=1,
        le=MANY,
    )

    @field_serializer("preset")
    def _one_or_several(self, preset: list[str]) -> str | list[str] | None:
        # Artifacts are made with at most one preset, and record it as a single value.
        return preset if len(preset) > 1 else next(iter(preset), None)
