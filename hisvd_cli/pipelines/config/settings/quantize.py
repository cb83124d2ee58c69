"""Whether and how what is compressed becomes integers."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import MANY, Section, setting


class QuantizeSettings(Section):
    """``[quantize]``: whether and how what is compressed becomes integers."""

    bits: Literal["none", "int8", "int4"] = setting(
        "none",
        "Store the sublayers, low-rank and dense ones, as integers: none, int8 or int4.",
        "--quantize",
    )
    method: Literal["nearest", "gptq"] = setting(
        "nearest",
        "How numbers are rounded: nearest, or gptq (each error is made up for in what is rounded "
        "after it; runs the model over calibration text).",
        "--quantize-method",
    )
    dense: Literal["int8", "same"] = setting(
        "int8",
        "int4: what the sublayers that stay dense become: int8, as those that a plan keeps whole "
        "bear the least, or the same.",
        "--quantize-dense",
    )
    group_size: int = setting(64, "int4: inputs of a row that share a scale.", ge=1, le=MANY)
    damping: float = setting(
        0.01,
        "gptq: added to the diagonal of an input's moment, as a share of its mean.",
        gt=0,
        le=1e6,
    )
