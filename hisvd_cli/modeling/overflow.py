"""Detects non-finite activations."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(state: Tensor) -> bool:
    """Return whether all values are finite. The sum is tested first, in a tenth of the time; it is
    only inconclusive if finite values overflow float32."""
    return bool(state.sum(dtype=torch.float32).isfinite()) or bool(state.isfinite().all())


def overflow_hint(dtype: torch.dtype) -> str:
    """Return the hint for non-finite activations in a dtype."""
    if dtype == torch.float16:
        return "Use `model.dtype` bfloat16 or float32; float16 overflows on many models."
    return "The model itself overflows: check it with 'hisvd eval', or use another checkpoint."
