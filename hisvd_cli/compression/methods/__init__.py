"""Decomposers: (W, statistics, rank, knobs) ─► (U, V), one file each, found by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hisvd_cli.utils.registry import Registry

Decomposer = Callable[..., tuple[Tensor, Tensor]]
"""``(W [m, n], statistics: Statistics, rank: int, *, knob=…, …) -> (U [m, r], V [r, n])``, both in
float64, best component first; knobs are keyword-only, and a decomposer names only those that it
uses. One that needs statistics declares them: ``register(name, needs={"gradients"})``."""

DECOMPOSERS: Registry[Decomposer] = Registry("decomposer", __name__, "hisvd.decomposers")
