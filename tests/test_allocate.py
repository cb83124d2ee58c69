"""Allocators: shares, stages, knobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hisvd_cli.allocation.budget import Budget, break_even, cost
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation
from hisvd_cli.allocation.methods.hisvd import MODULATIONS, cluster_tails
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.layers.shapes import numel
from tests.allocation import allocate

KNOBS: dict[str, Any] = {
    "rank_method": "effective",
    "alpha": 0.5,
    "modulation": "logarithmic",
    "lwe_strength": 1.0,
    "tail_redundancy_weight": 1.0,
    "spectrum": "whitened",
}


def _spectra() -> list[Spectrum]:
    """Four layers of two types: ``flat`` keeps energy in its tail, ``steep`` has hardly any."""
    found = []
    for layer in range(4):
        for cluster, decay in (("flat", 0.02), ("steep", 0.3)):
            j = torch.arange(64, dtype=torch.float64)
            energy = torch.exp(-decay * j) * (1 + layer)
            name = f"model.layers.{layer}.{cluster}"
            found.append(Spectrum(name, cluster, (64, 128), energy, energy))
    return found


def _budget(ratio: float, spectra: list[Spectrum]) -> Budget:
    shapes = [s.shape for s in spectra]
    total = sum(map(numel, shapes))
    return Budget(shapes, int(ratio * total), [1] * len(shapes))


def _hisvd(ratio: float = 0.6, **knobs: Any) -> Allocation:
    spectra = _spectra()
    return allocate("hisvd", spectra, _budget(ratio, spectra), **{**KNOBS, **knobs})


def test_uniform_gives_every_sublayer_the_ratio() -> None:
    spectra = _spectra()
    allocation = ALLOCATORS.get("uniform")(spectra, _budget(0.6, spectra))
    expected = 0.6 * break_even((64, 128))
    assert all(abs(rank - expected) <= 1 for rank in allocation.ranks)


def test_stage_one_gives_rank_in_proportion_to_density() -> None:
    allocation = _hisvd(lwe_strength=0.0, alpha=1.0, ratio=0.4)
    assert allocation.ranks == allocation.baselines
    flat, steep = allocation.ranks[0], allocation.ranks[1]
    densities = allocation.densities[0] / allocation.densities[1]
    assert flat / steep == pytest.approx(densities, rel=0.2)
    assert flat > steep


def test_alpha_zero_is_uniform_up_to_the_remainder() -> None:
    """Without density and stage 2 only the remainder, under one rank each, is shared otherwise."""
    spectra = _spectra()
    uniform = ALLOCATORS.get("uniform")(spectra, _budget(0.6, spectra))
    plain = _hisvd(alpha=0.0, lwe_strength=0.0)
    assert sum(plain.ranks) == sum(uniform.ranks)
    assert min(plain.ranks) == int(0.6 * break_even((64, 128)))
    assert sum(abs(a - b) for a, b in zip(plain.ranks, uniform.ranks, strict=True)) < len(spectra)


@pytest.mark.parametrize("modulation", sorted(MODULATIONS))
def test_stage_two_moves_rank_to_the_cluster_whose_tail_holds_energy(modulation: str) -> None:
    before = _hisvd(alpha=0.0, lwe_strength=0.0)
    after = _hisvd(alpha=0.0, modulation=modulation, lwe_strength=1.0)
    assert after.factors["flat"] > after.factors["steep"] >= 1.0
    assert sum(after.ranks[::2]) > sum(before.ranks[::2])
    assert sum(after.ranks[1::2]) < sum(before.ranks[1::2])


@pytest.mark.parametrize("modulation", sorted(MODULATIONS))
def test_modulations_are_one_at_zero_and_rise(modulation: str) -> None:
    factor = MODULATIONS[modulation]
    values = [factor(z / 10, 0.7) for z in range(11)]
    assert values[0] == 1.0
    assert values == sorted(set(values))


def test_cluster_tails_are_the_mean_over_truncated_sublayers() -> None:
    spectra = _spectra()
    ranks = [10, 64] * 4  # ``steep`` stays dense everywhere
    tails = cluster_tails(spectra, ranks)
    expected = float(spectra[0].energy[10:].sum() / spectra[0].energy.sum())
    assert tails["flat"] == pytest.approx(expected)
    assert tails["steep"] == 0.0


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_plans_stay_within_the_budget(ratio: float) -> None:
    spectra = _spectra()
    budget = _budget(ratio, spectra)
    spent = sum(cost(r, s.shape) for r, s in zip(_hisvd(ratio).ranks, spectra, strict=True))
    assert budget.parameters - (64 + 128) < spent <= budget.parameters


def test_an_all_zero_sublayer_is_no_special_case() -> None:
    spectra = _spectra()
    zero = torch.zeros(64, dtype=torch.float64)
    spectra[0] = Spectrum("dead", "flat", (64, 128), zero, zero)
    allocation = allocate("hisvd", spectra, _budget(0.5, spectra), **KNOBS)
    assert allocation.ranks[0] == 1


@pytest.mark.parametrize(
    ("knob", "value", "near"),
    [("rank_method", "stabel", "stable"), ("modulation", "linar", "linear")],
)
def test_unknown_values_of_options(knob: str, value: str, near: str) -> None:
    with pytest.raises(ValidationError, match=f"'{near}'"):
        _hisvd(0.6, **{knob: value})


def test_names_list_the_built_in_allocators() -> None:
    assert {"hisvd", "uniform"} <= set(ALLOCATORS.names())
