"""Settings of quantization."""

from __future__ import annotations

from typing import Literal

from hisvd_cli.pipelines.config.settings.fields import Section, setting
from hisvd_cli.utils.registry import MANY


class QuantizeSettings(Section):
    """``[quantize]``: quantization of the compressed layers."""

    bits: Literal["none", "int8", "int4"] = setting(
        "none",
        "Quantize the compressed linear layers: none, int8 or int4.",
        "--quantize",
        basic=True,
    )
    method: Literal["nearest", "gptq"] = setting(
        "nearest",
        "Rounding: nearest, or gptq (compensates rounding errors; runs the model over "
        "calibration text).",
        "--quantize-method",
    )
    dense: Literal["int8", "same"] = setting(
        "int8",
        "int4: how layers that stay dense are stored: int8, or the same as the others.",
        "--quantize-dense",
    )
    group_size: int = setting(64, "int4: number of inputs that share a scale.", ge=1, le=MANY)
    damping: float = setting(
        0.01,
        "gptq: dampening of the input moment, as a share of its mean diagonal.",
        gt=0,
        le=1e6,
    )
