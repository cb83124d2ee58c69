"""Detects activations that are not finite, and says what to do about them."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(state: Tensor) -> bool:
    """Tell whether all numbers are finite. Their sum says it in a tenth of the time, unless finite
    ones add up to more than float32 holds."""
    return bool(state.sum(dtype=torch.float32).isfinite()) or bool(state.isfinite().all())


def overflow_hint(dtype: torch.dtype) -> str:
    """Say what to do about activations that are not finite."""
    if dtype == torch.float16:
        return "Use --dtype bfloat16 or float32; float16 overflows on many models."
    return "The model itself overflows: try it with 'hisvd eval', or use another checkpoint."
