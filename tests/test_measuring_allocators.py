"""Allocators that measure the model, on a probe whose answers are a known function; and what holds
of every allocator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hisvd_cli.allocation.budget import Budget, break_even, full_rank
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Spectrum
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from hisvd_cli.modeling.layers.shapes import Shape, numel
from hisvd_cli.utils.errors import NumericalError
from tests.allocation import (
    allocate as run_allocator,
)
from tests.allocation import (
    choices,
    least_loss,
    make_budget,
    make_spectra,
    spent,
    tail_losses,
)

GRID = [0.2, 0.4, 0.6, 0.8]


class FakeProbe:
    """A sublayer at position p adds ``w·(1 − p/k*)²`` to the divergence, none at break-even."""

    def __init__(self, spectra: Sequence[Spectrum], weights: Sequence[float]) -> None:
        self._limits = [break_even(s.shape) for s in spectra]
        self._weights = weights
        self._index = {s.name: i for i, s in enumerate(spectra)}
        self.asked: list[tuple[str, int]] = []

    def at(self, i: int, position: float) -> float:
        """Return the divergence that one sublayer adds."""
        return self._weights[i] * max(1 - position / self._limits[i], 0.0) ** 2

    def divergence(self, name: str, rank: int) -> float:
        self.asked.append((name, rank))
        return self.at(self._index[name], rank)

    def perplexity(self, name: str, rank: int) -> float:
        return 20 * math.exp(self.divergence(name, rank))

    def soft_divergence(
        self, positions: Sequence[float], _width: float, _step: int
    ) -> tuple[float, list[float]]:
        slopes = [
            -2 * w * max(1 - p / k, 0.0) / k if math.isfinite(p) else 0.0
            for p, k, w in zip(positions, self._limits, self._weights, strict=True)
        ]
        return sum(self.at(i, p) for i, p in enumerate(positions)), slopes


def _weights(count: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[float] = (0.1 + torch.rand(count, generator=generator)).tolist()
    return drawn


# --- every allocator

KNOBS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "svdllm-v2": {"tokens": 1000},
    "zero-sum": {"selection": "zero-sum"},
    "swift": {"importance_weight": 0.6},
    "waterfill": {},
    "asvd": {"sensitivity_ratios": GRID},
    "lems": {"probe_ratio": 0.5, "depth_factor": 5.0},
    "learned": {
        "learning_start": "waterfill",
        "learning_steps": 5,
        "learning_rate": 0.02,
        "softness": 0.02,
    },
}
MEASURING = {"asvd", "lems", "learned"}
STEPS = [(1, 1), (2, 1), (2, 2)]
"""Floors, and what ranks are multiples of."""


def allocate(name: str, spectra: Sequence[Spectrum], budget: Budget) -> Allocation:
    probe = {"probe": FakeProbe(spectra, _weights(len(spectra)))} if name in MEASURING else {}
    return run_allocator(name, spectra, budget, **KNOBS[name], **probe)


def assert_next_to(budget: Budget, ranks: Sequence[int]) -> None:
    """Within the budget and above the floors, in steps, with no room for one step more."""
    left = budget.parameters - spent(ranks, budget.shapes, budget.storage)
    assert left >= 0
    for rank, shape, floor in zip(ranks, budget.shapes, budget.floors, strict=True):
        open_to_it = choices(shape, floor, budget.multiple_of, budget.storage)
        assert rank in open_to_it
        above = [price for other, price in open_to_it.items() if other > rank]
        assert not above or left < min(above) - open_to_it[rank]


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize(
    ("ratio", "floor", "multiple_of"),
    [(0.3, 1, 1), *((ratio, *steps) for ratio in (0.4, 0.6, 0.8, 0.95) for steps in STEPS)],
)
@pytest.mark.parametrize("storage", LAYERS)
def test_plans_are_within_the_budget_and_next_to_it(
    name: str, ratio: float, floor: int, multiple_of: int, storage: Storage
) -> None:
    spectra = make_spectra(6, seed=int(100 * ratio))
    budget = make_budget(spectra, ratio, floor, multiple_of, storage)
    assert_next_to(budget, allocate(name, spectra, budget).ranks)


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_plans_of_large_sublayers_are_next_to_the_budget(name: str, ratio: float) -> None:
    shapes: list[Shape] = [(96, 96), (32, 96), (256, 96), (96, 256)]
    spectra = [
        _falling(f"model.layers.{i}", shape, 0.02 * (1 + i)) for i, shape in enumerate(shapes)
    ]
    budget = make_budget(spectra, ratio)
    assert_next_to(budget, allocate(name, spectra, budget).ranks)


@pytest.mark.parametrize("name", KNOBS)
def test_a_full_budget_keeps_all_dense(name: str) -> None:
    spectra = make_spectra(3, seed=2)
    ranks = allocate(name, spectra, make_budget(spectra, 1.0)).ranks
    assert ranks == [full_rank(s.shape) for s in spectra]


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("dead", [1, 9])
def test_all_zero_spectra_are_no_special_case(name: str, dead: int) -> None:
    spectra = make_spectra(3, seed=3)
    for i in range(dead):
        nothing = torch.zeros(full_rank(spectra[i].shape), dtype=torch.float64)
        spectra[i] = replace(spectra[i], energy=nothing, weight_energy=nothing, changes=nothing)
    budget = make_budget(spectra, 0.6)
    assert_next_to(budget, allocate(name, spectra, budget).ranks)


def _falling(name: str, shape: Shape, decay: float) -> Spectrum:
    energy = 100 * torch.exp(-decay * torch.arange(full_rank(shape), dtype=torch.float64))
    return Spectrum(name, name, shape, energy, energy, 0, 0.5, energy * torch.cos(10 * energy))


# --- asvd


def _asvd(spectra: Sequence[Spectrum], budget: Budget, probe: FakeProbe) -> Allocation:
    return run_allocator("asvd", spectra, budget, probe=probe, sensitivity_ratios=GRID)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_asvd_allows_what_raises_the_perplexity_least(ratio: float, seed: int) -> None:
    """Against trying every threshold, the lowest that meets the budget."""
    spectra = make_spectra(4, seed)
    budget = make_budget(spectra, ratio)
    probe = FakeProbe(spectra, _weights(len(spectra), seed))
    found = _asvd(spectra, budget, probe)
    options = [
        {r: probe.at(i, r) for share in GRID if (r := max(int(share * break_even(s.shape)), 1))}
        for i, s in enumerate(spectra)
    ]
    thresholds = sorted({-1.0, *(loss for option in options for loss in option.values())})
    for threshold in thresholds:
        ranks = [
            min([r for r, loss in option.items() if loss <= threshold], default=min(s.shape))
            for option, s in zip(options, spectra, strict=True)
        ]
        if spent(ranks, budget.shapes) <= budget.parameters:
            break
    assert found.baselines == ranks
    assert all(a >= b for a, b in zip(found.ranks, ranks, strict=True))  # what is left is spent


def test_asvd_measures_each_sublayer_at_each_share_once() -> None:
    spectra = make_spectra(2, seed=0)
    probe = FakeProbe(spectra, _weights(len(spectra)))
    _asvd(spectra, make_budget(spectra, 0.6), probe)
    expected = {
        (s.name, max(int(share * break_even(s.shape)), 1)) for s in spectra for share in GRID
    }
    assert len(probe.asked) == len(expected)
    assert set(probe.asked) == expected


def test_asvd_scales_a_grid_that_keeps_too_much() -> None:
    spectra = make_spectra(4, seed=1)
    budget = make_budget(spectra, 0.3)
    probe = FakeProbe(spectra, _weights(len(spectra)))
    ranks = run_allocator("asvd", spectra, budget, probe=probe, sensitivity_ratios=[0.7]).ranks
    assert_next_to(budget, ranks)


# --- lems


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("depth_factor", [0.0, 5.0])
def test_lems_minimises_measured_divergence_carried_along_the_tail(
    ratio: float, depth_factor: float
) -> None:
    spectra = make_spectra(20, seed=5)
    budget = make_budget(spectra, ratio)
    probe = FakeProbe(spectra, _weights(len(spectra)))
    ranks = run_allocator(
        "lems", spectra, budget, probe=probe, probe_ratio=0.5, depth_factor=depth_factor
    ).ranks
    losses = []
    for i, s in enumerate(spectra):
        rank = max(1, int(0.5 * break_even(s.shape)))
        depth = 1 + depth_factor * (1 - s.layer / 19)
        scale = depth * probe.at(i, rank) / float(s.energy[rank:].sum())
        losses.append({r: scale * tail for r, tail in tail_losses(s).items()})
    least = least_loss(losses, budget)
    total = sum(loss[rank] for loss, rank in zip(losses, ranks, strict=True))
    assert least - 1e-9 <= total <= 1.02 * least


def test_lems_measures_once_per_sublayer() -> None:
    spectra = make_spectra(3, seed=0)
    probe = FakeProbe(spectra, _weights(len(spectra)))
    budget = make_budget(spectra, 0.6)
    run_allocator("lems", spectra, budget, probe=probe, probe_ratio=0.3, depth_factor=1.0)
    expected = [(s.name, max(1, int(0.3 * break_even(s.shape)))) for s in spectra]
    assert probe.asked == expected


def test_lems_depth_factor_favours_early_blocks() -> None:
    spectrum = _falling("model.layers.0", (96, 96), 0.05)
    spectra = [replace(spectrum, name=f"model.layers.{i}", layer=i) for i in range(4)]
    probe = FakeProbe(spectra, [1.0] * 4)
    ranks = run_allocator(
        "lems", spectra, make_budget(spectra, 0.5), probe=probe, probe_ratio=0.5, depth_factor=5.0
    ).ranks
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]


# --- learned


def _learned(
    spectra: Sequence[Spectrum], budget: Budget, weights: Sequence[float], steps: int
) -> Allocation:
    return run_allocator(
        "learned",
        spectra,
        budget,
        probe=FakeProbe(spectra, weights),
        learning_start="waterfill",
        learning_steps=steps,
        learning_rate=0.01,
        softness=0.02,
    )


def _optimal_positions(budget: Budget, weights: Sequence[float]) -> list[float]:
    """Return shares x of break-even that minimise Σ w(1 − x)² with Σ x·mn the budget: where none
    is at an end, 1 − x is in proportion to mn/w."""
    sizes = list(map(numel, budget.shapes))
    scale = (sum(sizes) - budget.parameters) / sum(
        size**2 / w for size, w in zip(sizes, weights, strict=True)
    )
    shares = [1 - scale * size / w for size, w in zip(sizes, weights, strict=True)]
    assert all(0.05 < share < 1 for share in shares)
    return shares


@pytest.mark.parametrize("ratio", [0.6, 0.8])
def test_learned_approaches_the_optimum_that_the_divergence_has(ratio: float) -> None:
    """From the optimum of spectra that say nothing of it, over sublayers of different sizes."""
    shapes: list[Shape] = [(96, 96), (64, 96), (192, 96), (96, 192)] * 3
    spectra = [_falling(f"model.layers.{i}", shape, 0.06) for i, shape in enumerate(shapes)]
    budget = make_budget(spectra, ratio)
    # Weights in proportion to sizes, up to a factor from 1 to 3: no position ends at an end.
    weights = [numel(s) * (1 + i * 5 % 12 / 6) for i, s in enumerate(shapes)]
    optimum = _optimal_positions(budget, weights)

    def distance(ranks: Sequence[int]) -> float:
        shares = [min(r / break_even(s), 1.0) for r, s in zip(ranks, shapes, strict=True)]
        return max(abs(a - b) for a, b in zip(shares, optimum, strict=True))

    allocation = _learned(spectra, budget, weights, steps=200)
    assert distance(allocation.baselines) > 0.3
    assert distance(allocation.ranks) < 0.06
    assert_next_to(budget, allocation.ranks)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_learned_is_not_pulled_by_a_sublayer_at_its_floor(scale: float) -> None:
    """One that hardly matters ends there; the others share as if it were not in the sum."""
    shapes: list[Shape] = [(192, 192), (64, 96), (192, 96), (96, 192), (96, 96)]
    spectra = [_falling(f"model.layers.{i}", shape, 0.06) for i, shape in enumerate(shapes)]
    budget = make_budget(spectra, 0.35)
    weights = [scale, *(scale * numel(s) * (1 + i % 2) for i, s in enumerate(shapes[1:]))]
    ranks = _learned(spectra, budget, weights, steps=300).ranks
    rest = Budget(shapes[1:], budget.parameters - (192 + 192), [1] * 4)
    optimum = [
        x * break_even(s)
        for x, s in zip(_optimal_positions(rest, weights[1:]), shapes[1:], strict=True)
    ]
    assert ranks[0] <= 2
    assert all(abs(r - x) <= 3 for r, x in zip(ranks[1:], optimum, strict=True))


def test_learned_starts_from_waterfill_and_lowers_the_divergence() -> None:
    shapes: list[Shape] = [(96, 96), (64, 96), (192, 96)] * 3
    spectra = [_falling(f"model.layers.{i}", s, 0.03 * (1 + i % 2)) for i, s in enumerate(shapes)]
    budget, weights = make_budget(spectra, 0.5), _weights(len(shapes), seed=4)
    probe = FakeProbe(spectra, weights)

    def divergence(ranks: Sequence[int]) -> float:
        return sum(probe.at(i, rank) for i, rank in enumerate(ranks))

    start = ALLOCATORS.get("waterfill")(spectra, budget).ranks
    plans = [_learned(spectra, budget, weights, steps) for steps in (10, 40)]
    assert all(plan.baselines == start for plan in plans)
    losses = [divergence(start), *(divergence(plan.ranks) for plan in plans)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_learned_brings_a_dense_sublayer_down_that_matters_least() -> None:
    """Its flat spectrum makes it dense at the start; measured, it matters least."""
    flat = torch.ones(96, dtype=torch.float64) * 100
    spectra = [_falling(f"model.layers.{i}", (96, 96), 0.1) for i in range(4)]
    spectra[0] = replace(spectra[0], energy=flat)
    budget = make_budget(spectra, 0.6)
    allocation = _learned(spectra, budget, [0.2, 1.0, 1.5, 2.0], steps=150)
    assert allocation.baselines[0] == 96
    assert allocation.ranks[0] == min(allocation.ranks)


# --- measurements that fail


@pytest.mark.parametrize("name", sorted(MEASURING))
def test_a_measurement_that_is_nan_is_an_error_that_names_what_was_measured(name: str) -> None:
    spectra = make_spectra(2, seed=0)

    class Broken(FakeProbe):
        def divergence(self, name: str, rank: int) -> float:
            return math.nan if name == spectra[1].name else super().divergence(name, rank)

        def soft_divergence(
            self, positions: Sequence[float], _width: float, _step: int
        ) -> tuple[float, list[float]]:
            return math.nan, [0.0] * len(positions)

    probe = Broken(spectra, _weights(len(spectra)))
    with pytest.raises(NumericalError) as caught:
        run_allocator(name, spectra, make_budget(spectra, 0.6), **KNOBS[name], probe=probe)
    assert ("step 1" if name == "learned" else spectra[1].name) in caught.value.message
