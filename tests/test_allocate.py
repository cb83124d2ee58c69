"""Allocators: shares, stages, knobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from hisvd_cli.allocation.budget import Budget, break_even, cost, full_rank
from hisvd_cli.allocation.methods import ALLOCATORS, WEIGHT_SPECTRA, Allocation
from hisvd_cli.allocation.methods.hisvd import MODULATIONS, cluster_tails
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.layers.shapes import numel
from tests.allocation import allocate, make_budget

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
    assert allocation.baselines == allocation.ranks


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


@pytest.mark.parametrize("spectrum", ["whitened", "weight"])
@pytest.mark.parametrize("modulation", sorted(MODULATIONS))
def test_both_stages_follow_their_formulas(spectrum: str, modulation: str) -> None:
    """In numpy, on layers of three shapes whose two spectra differ."""
    spectra = _varied()
    budget = make_budget(spectra, 0.45)
    options = {"spectrum": spectrum, "modulation": modulation, "rank_method": "stable"}
    knobs = {"alpha": 0.7, "lwe_strength": 0.8, "tail_redundancy_weight": 2.0}
    allocation = allocate("hisvd", spectra, budget, **options, **knobs)

    measured = [s.of_weight if spectrum == "weight" else s.energy for s in spectra]
    densities = [
        float(e.sum() / e.max()) / full_rank(s.shape)
        for e, s in zip(measured, spectra, strict=True)
    ]
    assert allocation.densities == pytest.approx(densities)
    first = np.array(densities) ** 0.7
    assert allocation.baselines == _filled(first, budget, spectra)

    tails: dict[str, list[float]] = {s.cluster: [] for s in spectra}
    for rank, s in zip(allocation.baselines, spectra, strict=True):
        if rank < full_rank(s.shape):
            tails[s.cluster].append(float(s.energy[rank:].sum() / s.energy.sum()))
    means = {cluster: float(np.mean(shares)) for cluster, shares in tails.items()}
    assert allocation.tail_shares == pytest.approx(means)
    factors = {cluster: _factor(modulation, 2.0 * mean, 0.8) for cluster, mean in means.items()}
    assert allocation.factors == pytest.approx(factors)
    second = first * [factors[s.cluster] for s in spectra]
    assert allocation.ranks == _filled(second, budget, spectra)
    assert allocation.ranks != allocation.baselines


def _varied() -> list[Spectrum]:
    """Nine layers of three types, each of a shape of its own; spectra of weights fall slower."""
    found = []
    for layer in range(3):
        for cluster, shape, decay in (
            ("q", (48, 48), 0.04),
            ("k", (24, 48), 0.2),
            ("up", (80, 48), 0.1),
        ):
            j = torch.arange(min(shape), dtype=torch.float64)
            energy = (1 + layer) * torch.exp(-decay * (1 + layer / 5) * j)
            of_weight = torch.exp(-decay * (0.7 - layer / 10) * j)
            found.append(Spectrum(f"{layer}.{cluster}", cluster, shape, energy, of_weight, layer))
    return found


def _filled(wanted: NDArray[np.float64], budget: Budget, spectra: list[Spectrum]) -> list[int]:
    """Return the ranks of shares of mn in proportion to ``wanted``, with the remainder spent."""
    sizes = np.array([cost(full_rank(s), s) for s in budget.shapes])
    shares = wanted * budget.parameters / (wanted * sizes).sum()
    ranks = shares * [break_even(s) for s in budget.shapes]
    assert ranks.min() >= 1  # nothing is clipped
    assert shares.max() < 1
    return budget.filled([int(rank) for rank in ranks], [s.energy for s in spectra])


def _factor(modulation: str, z: float, beta: float) -> float:
    if modulation == "logarithmic":
        return float(1 + beta * np.log(1 + z))
    if modulation == "linear":
        return 1 + beta * z
    return float((1 + z) ** beta if modulation == "power" else np.exp(beta * z))


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
    ranks = [10, 64, 20, 64, 64, 64, 64, 64]  # ``steep`` stays dense everywhere, ``flat`` in part
    tails = cluster_tails(spectra, ranks)
    energy = spectra[0].energy.numpy()  # of all ``flat`` ones, up to a factor
    expected = (energy[10:].sum() + energy[20:].sum()) / (2 * energy.sum())
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


def test_spectra_of_weights_are_needed_if_stage_one_reads_them() -> None:
    assert ALLOCATORS.needs("hisvd", {"spectrum": "weight"}) == {WEIGHT_SPECTRA}
    assert ALLOCATORS.needs("hisvd", {"spectrum": "whitened"}) == set()


def test_names_list_the_built_in_allocators() -> None:
    assert {"hisvd", "uniform"} <= set(ALLOCATORS.names())
