"""Spectra, budgets, and an exact solver for the tests of allocators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hisvd_cli.allocation.budget import Budget
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.layers.lowrank import Storage
from hisvd_cli.modeling.layers.shapes import Shape, matrix_of, numel

KINDS: list[tuple[str, Shape]] = [("q", (12, 12)), ("k", (6, 12)), ("up", (20, 12))]


def make_spectra(layers: int, seed: int, scale: float = 100.0) -> list[Spectrum]:
    """Return one sublayer of each kind per layer, their energies falling at random speeds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    found = []
    for layer in range(layers):
        importance = float(draw(1))
        for kind, shape in KINDS:
            full = min(shape)
            decay = torch.exp(-0.5 * draw(1) * torch.arange(full))
            energy = (scale * (0.2 + draw(1)) * decay * (0.5 + draw(full))).sort(descending=True)
            changes = draw(full) - 0.5
            found.append(
                Spectrum(
                    f"model.layers.{layer}.{kind}",
                    kind,
                    shape,
                    energy.values,
                    energy.values,
                    layer,
                    importance,
                    changes,
                )
            )
    return found


def make_budget(
    spectra: Sequence[Spectrum],
    ratio: float,
    floor: int = 1,
    multiple_of: int = 1,
    storage: Storage = "pair",
) -> Budget:
    """Return the budget of a keep ratio."""
    shapes = [s.shape for s in spectra]
    total = sum(map(numel, shapes))
    return Budget(shapes, round(ratio * total), [floor] * len(shapes), multiple_of, storage)


def allocate(name: str, spectra: Sequence[Spectrum], budget: Budget, **values: Any) -> Allocation:
    """Run an allocator with options, and whatever else it names, from ``values``."""
    return ALLOCATORS.get(name)(spectra, budget, **ALLOCATORS.arguments(name, values))


def choices(
    shape: Shape, floor: int = 1, step: int = 1, storage: Storage = "pair"
) -> dict[int, int]:
    """Return rank → parameters, of all truncated ranks and (as full rank) dense."""
    m, n = matrix_of(shape)
    count = 1 if len(shape) == 2 else shape[0]
    pivots = storage == "pivoted" and len(shape) == 2  # stacks are always plain pairs
    # Written out from the tensors: V′ and C, or U and V, and a number for the place of each row.
    sizes = {
        r: r * n + (m - r) * r + m if pivots else r * n + m * r
        for r in range(floor, min(m, n), step)
    }
    factored = {r: count * size for r, size in sizes.items() if size < m * n}
    return {**factored, min(m, n): count * m * n}


def spent(ranks: Sequence[int], shapes: Sequence[Shape], storage: Storage = "pair") -> int:
    """Return the parameters of ranks, each of which must be one of the choices."""
    return sum(
        choices(shape, storage=storage)[rank] for rank, shape in zip(ranks, shapes, strict=True)
    )


def tail_losses(
    spectrum: Spectrum, floor: int = 1, step: int = 1, storage: Storage = "pair"
) -> dict[int, float]:
    """Return rank → energy dropped, 0 for dense."""
    full = min(spectrum.shape)
    return {
        r: float(spectrum.energy[r:].sum()) if r < full else 0.0
        for r in choices(spectrum.shape, floor, step, storage)
    }


def least_loss(losses: Sequence[Mapping[int, float]], budget: Budget) -> float:
    """Return the least sum of losses within a budget, by dynamic programming over parameters."""
    best = torch.zeros(budget.parameters + 1, dtype=torch.float64)
    for options, shape in zip(losses, budget.shapes, strict=True):
        following = torch.full_like(best, torch.inf)
        prices = choices(shape, storage=budget.storage)
        for rank, loss in options.items():
            price = prices[rank]
            if price <= budget.parameters:
                shifted = best[: budget.parameters + 1 - price] + loss
                following[price:] = torch.minimum(following[price:], shifted)
        best = following
    return float(best[-1])
