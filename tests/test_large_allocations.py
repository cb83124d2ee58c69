"""Allocators on layers so large that rounding to integer ranks hides little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hisvd_cli.allocation.budget import Budget, break_even, full_rank
from hisvd_cli.allocation.methods import Spectrum
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from tests.allocation import allocate, choices, make_budget
from tests.test_measuring_allocators import FakeProbe

TYPES: list[tuple[str, tuple[int, int], float]] = [
    ("q", (120, 120), 0.02),
    ("k", (60, 120), 0.04),
    ("up", (200, 120), 0.03),
]
"""Type, shape, and decay of the energies."""


def large_spectra(layers: int = 4) -> list[Spectrum]:
    """Return one sublayer of each type per layer; energies fall faster from layer to layer."""
    found = []
    for layer in range(layers):
        for cluster, shape, decay in TYPES:
            j = torch.arange(min(shape), dtype=torch.float64)
            energy = 100 * torch.exp(-decay * (1 + layer / 3) * j)
            importance = 0.1 + 0.2 * (layer * 3 % layers)
            name = f"{layer}.{cluster}"
            found.append(Spectrum(name, cluster, shape, energy, energy, layer, importance))
    return found


def energies_of(spectra: list[Spectrum]) -> list[Tensor]:
    return [s.energy for s in spectra]


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_swift_follows_its_formula(weight: float) -> None:
    """The shares of a type have the mean of the budget: nothing is left to scale."""
    spectra = large_spectra()
    budget = make_budget(spectra, 0.5)
    allocation = allocate("swift", spectra, budget, importance_weight=weight)
    ratio = budget.parameters / budget.spent([full_rank(s.shape) for s in spectra])
    angles = np.array([s.importance for s in spectra], dtype=np.float64)
    importance = 1 + (angles - angles.min()) / np.ptp(angles)
    sigmas = [s.energy.sqrt().numpy() for s in spectra]
    entropies = [-np.sum(p * np.log(p)) for p in (sigma / sigma.sum() for sigma in sigmas)]
    densities = np.exp(entropies) / [full_rank(s.shape) for s in spectra]
    scores = importance**weight * densities ** (1 - weight)
    uniform = [ratio * break_even(s.shape) for s in spectra]
    wanted = []
    for s, score, rank in zip(spectra, scores, uniform, strict=True):
        own = [x for x, other in zip(scores, spectra, strict=True) if other.cluster == s.cluster]
        wanted.append(float(rank * (0.5 + 0.5 * score / np.mean(own))))
        assert 1 < wanted[-1] < break_even(s.shape)  # nothing is clipped
    assert allocation.ranks == budget.rounded(wanted, energies_of(spectra), nearest=True)
    assert allocation.baselines == list(map(int, uniform))
    assert allocation.densities == pytest.approx(list(densities))


def test_svdllm_v2_keeps_the_floor_of_layers_that_it_would_remove_altogether() -> None:
    """Three of four lose so little that their shares to remove exceed 1: the last keeps the rest
    of the 24 ranks of the budget."""
    shape = (60, 60)
    scales = [1e-9, 1e-9, 1e-9, 1e4]
    flat = torch.ones(60, dtype=torch.float64)
    spectra = [Spectrum(str(i), "q", shape, x * flat, None) for i, x in enumerate(scales)]
    budget = make_budget(spectra, 0.2)
    assert allocate("svdllm-v2", spectra, budget, tokens=1000).ranks == [1, 1, 1, 21]


def test_zero_sum_gives_back_at_most_one_step_of_ranks() -> None:
    """Rounding down to multiples of 8 leaves three steps; the first layer has most energy."""
    spectra = []
    for i in range(6):
        energy = torch.linspace(2, 1, 64, dtype=torch.float64) * (1000 if i == 0 else 1)
        changes = torch.linspace(1, 0, 64, dtype=torch.float64) + 0.04 * i
        spectra.append(Spectrum(str(i), "q", (64, 64), energy, None, changes=changes))
    budget = make_budget(spectra, 0.5, floor=8, multiple_of=8)
    allocation = allocate("zero-sum", spectra, budget, selection="smallest")
    whole = [rank // 8 * 8 for rank in allocation.baselines]
    steps = [(b - a) // 8 for a, b in zip(whole, allocation.ranks, strict=True)]
    assert max(allocation.ranks) < 32  # break-even
    assert sorted(steps) == [0, 0, 0, 1, 1, 1]
    assert steps[0] == 1


def test_zero_sum_starts_with_a_positive_change() -> None:
    changes = [-0.2, 0.3]
    energy = torch.tensor([2.0, 1.0], dtype=torch.float64)
    spectra = [
        Spectrum(str(x), "q", (2, 20), energy, None, changes=torch.tensor([0.0, x]).double())
        for x in changes
    ]
    budget = Budget([(2, 20)] * 2, 80 - 18, [1, 1])
    assert allocate("zero-sum", spectra, budget, selection="zero-sum").ranks == [2, 1]


def test_zero_sum_meets_a_budget_one_short_of_dense() -> None:
    spectra = [replace(s, changes=s.energy) for s in large_spectra(1)]
    budget = make_budget(spectra, 1.0)
    budget = replace(budget, parameters=budget.parameters - 1)
    ranks = allocate("zero-sum", spectra, budget, selection="zero-sum").ranks
    assert budget.spent(ranks) <= budget.parameters


@pytest.mark.parametrize("storage", LAYERS)
def test_asvd_measures_the_largest_ranks_that_cost_the_shares_of_its_grid(storage: Storage) -> None:
    spectra = large_spectra(1)
    probe = FakeProbe(spectra, [1.0] * 3)
    grid = [0.25, 0.55]
    budget = make_budget(spectra, 0.5, storage=storage)
    allocate("asvd", spectra, budget, probe=probe, sensitivity_ratios=grid)
    expected = []
    for s, (_, shape, _) in zip(spectra, TYPES, strict=True):
        prices = choices(shape, storage=storage)
        for share in grid:
            limit = share * shape[0] * shape[1]
            expected.append((s.name, max(r for r, price in prices.items() if price <= limit)))
    assert probe.asked == expected


def test_asvd_scales_all_ranks_by_one_factor_if_its_grid_keeps_too_much() -> None:
    spectra = large_spectra()
    budget = make_budget(spectra, 0.3)
    probe = FakeProbe(spectra, [1.0] * len(spectra))
    allocation = allocate("asvd", spectra, budget, probe=probe, sensitivity_ratios=[0.7])
    smallest = [int(0.7 * break_even(s.shape)) for s in spectra]
    assert allocation.baselines == smallest
    scale = budget.parameters / budget.spent(smallest)
    wanted = [int(scale * rank) for rank in smallest]
    assert allocation.ranks == budget.filled(wanted, energies_of(spectra))


@pytest.mark.parametrize("name", ["waterfill", "lems"])
def test_baselines_are_the_ranks_of_allocators_of_one_stage(name: str) -> None:
    spectra = large_spectra(2)
    options = {"probe": FakeProbe(spectra, [1.0] * len(spectra))} if name == "lems" else {}
    allocation = allocate(name, spectra, make_budget(spectra, 0.5), **options)
    assert allocation.baselines == allocation.ranks
