"""Decomposers: (W, moment, rank) ─► (U, V), one file each, found by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hisvd_cli.moments import Moment
from hisvd_cli.registry import Registry

Decomposer = Callable[[Tensor, Moment | None, int], tuple[Tensor, Tensor]]
"""``(W [m, n], moment or None, rank) -> (U [m, r], V [r, n])``, both in float64."""

DECOMPOSERS: Registry[Decomposer] = Registry("decomposer", __name__, "hisvd.decomposers")
