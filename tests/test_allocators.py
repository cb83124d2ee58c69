"""Allocators that follow a formula, each against another way to work it out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from hisvd_cli.allocation.budget import Budget, break_even, full_rank, is_dense
from hisvd_cli.allocation.methods import ALLOCATORS, Allocation, Spectrum
from hisvd_cli.allocation.methods.waterfill import optimal_ranks
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from hisvd_cli.modeling.layers.shapes import matrix_of, numel
from hisvd_cli.utils.errors import SourceError
from tests.allocation import (
    allocate,
    choices,
    least_loss,
    make_budget,
    make_spectra,
    spent,
    tail_losses,
)

SELECTIONS = ["zero-sum", "smallest", "negative-sum", "sigma", "loss-order"]
TOKENS = 1000


def lost(spectra: list[Spectrum], ranks: list[int], storage: Storage = "pair") -> float:
    return sum(
        tail_losses(s, storage=storage)[rank] for s, rank in zip(spectra, ranks, strict=True)
    )


# --- waterfill


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("storage", LAYERS)
def test_waterfill_is_within_one_step_of_the_optimum(
    seed: int, ratio: float, storage: Storage
) -> None:
    spectra = make_spectra(3, seed)
    budget = make_budget(spectra, ratio, storage=storage)
    ranks = ALLOCATORS.get("waterfill")(spectra, budget).ranks
    least = least_loss([tail_losses(s, storage=storage) for s in spectra], budget)
    # The largest step that some multiplier takes: along the lower convex hull of each curve.
    step = max(a[1] - b[1] for s in spectra for a, b in pairwise(_lower_hull(curve(s, storage))))
    assert least - 1e-9 <= lost(spectra, ranks, storage) <= least + step


def curve(spectrum: Spectrum, storage: Storage) -> list[tuple[int, float]]:
    """Return (parameters, loss) of every choice, cheapest first."""
    prices = choices(spectrum.shape, storage=storage)
    return sorted((prices[r], x) for r, x in tail_losses(spectrum, storage=storage).items())


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Andrew's monotone chain."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x2) < (y - y2) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("price", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(("floor", "step"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("storage", LAYERS)
def test_waterfill_finds_every_lagrangian_optimum_exactly(
    seed: int, price: float, floor: int, step: int, storage: Storage
) -> None:
    """What minimises loss + μ·cost sublayer by sublayer is optimal at its own cost."""
    spectra = make_spectra(4, seed)
    best = []
    for s in spectra:
        losses = tail_losses(s, floor, step, storage)
        costs = choices(s.shape, floor, step, storage)
        best.append(min(losses, key=lambda r, x=losses, c=costs: x[r] + price * c[r]))  # type: ignore[misc]
    parameters = spent(best, [s.shape for s in spectra], storage)
    budget = Budget([s.shape for s in spectra], parameters, [floor] * len(spectra), step, storage)
    assert ALLOCATORS.get("waterfill")(spectra, budget).ranks == best


def test_waterfill_is_near_the_optimum_of_many_sublayers() -> None:
    """With many sublayers one step is little: within 1 % of the exact optimum."""
    spectra = make_spectra(20, seed=9)
    for ratio in (0.3, 0.5, 0.7, 0.9):
        budget = make_budget(spectra, ratio)
        ranks = ALLOCATORS.get("waterfill")(spectra, budget).ranks
        least = least_loss([tail_losses(s) for s in spectra], budget)
        assert lost(spectra, ranks) <= 1.01 * least


def test_waterfill_keeps_dense_what_no_truncation_suits() -> None:
    """A flat spectrum loses its whole tail at any rank below break-even, a steep one nothing."""
    flat = torch.ones(12, dtype=torch.float64)
    steep = torch.cat([torch.ones(2), torch.zeros(10)]).double()
    spectra = [
        Spectrum("flat", "q", (12, 12), flat, flat),
        Spectrum("steep", "q", (12, 12), steep, steep),
    ]
    budget = Budget([(12, 12)] * 2, 144 + 2 * 24, [1, 1])
    assert ALLOCATORS.get("waterfill")(spectra, budget).ranks == [12, 2]


def test_optimal_ranks_respect_weights() -> None:
    """A sublayer whose energies count more gets more."""
    energy = torch.linspace(2, 1, 12, dtype=torch.float64)
    budget = Budget([(12, 12)] * 2, 4 * 24, [1, 1])
    assert optimal_ranks(budget, [energy, 100 * energy])[1] == 3


# --- zero-sum


def _naive_zero_sum(spectra: list[Spectrum], budget: Budget, selection: str) -> list[int]:
    """Look through every sublayer's smallest component at each step."""
    shapes = budget.shapes
    ranks = [min(s) for s in shapes]
    total = 0.0

    def size() -> int:
        return sum(
            min(m * n, r * (m + n)) for (m, n), r in zip(map(matrix_of, shapes), ranks, strict=True)
        )

    while size() > budget.parameters:
        offers = []
        for i, s in enumerate(spectra):
            if ranks[i] > budget.floors[i]:
                assert s.changes is not None
                offers.append((float(s.changes[ranks[i] - 1]), float(s.energy[ranks[i] - 1]), i))
        if selection == "zero-sum":
            opposing = [o for o in offers if (o[0] < 0) == (total > 0)]
            change, _, i = min(opposing or offers, key=lambda o: abs(o[0]))
        elif selection == "negative-sum":
            negative = [o for o in offers if o[0] < 0]
            change, _, i = min(negative or offers, key=lambda o: abs(o[0]))
        elif selection == "smallest":
            change, _, i = min(offers, key=lambda o: abs(o[0]))
        elif selection == "sigma":
            change, _, i = min(offers, key=lambda o: math.sqrt(o[1]))
        else:
            change, _, i = min(offers)
        ranks[i] -= 1
        total += change
    return ranks


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.95])
def test_zero_sum_drops_what_a_search_at_each_step_drops(
    selection: str, seed: int, ratio: float
) -> None:
    spectra = make_spectra(5, seed)
    budget = make_budget(spectra, ratio)
    allocation = allocate("zero-sum", spectra, budget, selection=selection)
    dropped = _naive_zero_sum(spectra, budget, selection)
    assert allocation.baselines == dropped
    # What the last component freed beyond need goes back, at most a step to each.
    for rank, before, s in zip(allocation.ranks, dropped, spectra, strict=True):
        if is_dense(before, s.shape):
            assert rank == full_rank(s.shape)
        else:
            assert rank in (before, before + 1) or is_dense(before + 1, s.shape)


@pytest.mark.parametrize(
    ("selection", "dropped"),
    [
        ("zero-sum", {0, 2}),  # a positive one first, then one that opposes it
        ("smallest", {0, 1}),
        ("negative-sum", {2, 3}),
        ("loss-order", {3, 4}),
        ("sigma", {5, 6}),
    ],
)
def test_selections_drop_what_their_names_say(selection: str, dropped: set[int]) -> None:
    """Seven sublayers that offer one component each, of which two must go."""
    changes = [0.1, 0.12, -0.2, -0.25, -0.9, 0.5, 0.6]
    spectra = []
    for i, change in enumerate(changes):
        energy = torch.tensor([9.0, 1.0 if i > 4 else 4.0], dtype=torch.float64)
        offered = torch.tensor([0.0, change], dtype=torch.float64)
        spectra.append(Spectrum(str(i), "q", (2, 20), energy, energy, changes=offered))
    budget = Budget([(2, 20)] * 7, 7 * 40 - 2 * 18, [1] * 7)
    ranks = allocate("zero-sum", spectra, budget, selection=selection).ranks
    assert {i for i, rank in enumerate(ranks) if rank == 1} == dropped


def test_the_running_sum_stays_nearer_zero_than_with_other_selections() -> None:
    spectra = make_spectra(12, seed=3)
    budget = make_budget(spectra, 0.6)

    def total(selection: str) -> float:
        ranks = allocate("zero-sum", spectra, budget, selection=selection).baselines
        dropped = 0.0
        for s, rank in zip(spectra, ranks, strict=True):
            assert s.changes is not None
            dropped += float(s.changes[rank:].sum())
        return dropped

    sums = {selection: total(selection) for selection in SELECTIONS}
    assert abs(sums["zero-sum"]) == min(map(abs, sums.values()))
    assert sums["negative-sum"] < sums["zero-sum"]


def test_zero_sum_names_the_command_that_takes_its_gradients() -> None:
    spectra = [replace(s, changes=None) for s in make_spectra(1, seed=0)]
    with pytest.raises(SourceError) as caught:
        allocate("zero-sum", spectra, make_budget(spectra, 0.5), selection="sigma")
    assert "hisvd calibrate --weight-gradients" in caught.value.hint


def test_zero_sum_names_the_selections() -> None:
    spectra = make_spectra(1, seed=0)
    with pytest.raises(ValidationError, match="'zero-sum'"):
        allocate("zero-sum", spectra, make_budget(spectra, 0.5), selection="zerosum")


# --- svdllm-v2


def _svdllm_v2(spectra: list[Spectrum], ratio: float, tokens: int = TOKENS) -> Allocation:
    return ALLOCATORS.get("svdllm-v2")(spectra, make_budget(spectra, ratio), tokens=tokens)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_svdllm_v2_removes_in_proportion_to_one_over_log_of_the_loss(ratio: float) -> None:
    """Algorithm 1 of the paper, in numpy: R = len · R_target · (1/log L) / Σ(1/log L)."""
    spectra = make_spectra(6, seed=4)
    budget = make_budget(spectra, ratio)
    ranks = _svdllm_v2(spectra, ratio).ranks
    target = 1 - budget.parameters / sum(map(numel, budget.shapes))
    for kind in ("q", "k", "up"):
        mine = [i for i, s in enumerate(spectra) if s.cluster == kind]
        m, n = matrix_of(spectra[mine[0]].shape)
        uniform = int((1 - target) * m * n / (m + n))
        loss = np.array([np.sqrt(TOKENS * spectra[i].energy.numpy()[uniform:].sum()) for i in mine])
        assert loss.min() > np.e  # or the guard would count
        removed = len(mine) * target * (1 / np.log(loss)) / (1 / np.log(loss)).sum()
        expected = (1 - removed) * m * n / (m + n)
        assert ((expected > 1) & (expected < m * n / (m + n))).all()  # nothing is clipped
        for i, rank in zip(mine, expected, strict=True):
            assert ranks[i] in (int(rank), int(rank) + 1) or is_dense(int(rank) + 1, (m, n))


def test_svdllm_v2_keeps_more_of_what_loses_more() -> None:
    quiet = make_spectra(1, seed=5)[0]
    loud = replace(quiet, name="loud", energy=quiet.energy * 1e4)
    low, high = _svdllm_v2([quiet, loud], 0.5).ranks
    assert high > low


def test_svdllm_v2_takes_losses_below_its_least_as_equal() -> None:
    """Where log L would be negative or 0 all count alike: the uniform shares."""
    spectra = make_spectra(6, seed=6, scale=1e-9)
    allocation = _svdllm_v2(spectra, 0.5)
    assert allocation.baselines == [int(0.5 * break_even(s.shape)) for s in spectra]
    for rank, uniform in zip(allocation.ranks, allocation.baselines, strict=True):
        assert 0 <= rank - uniform <= 1


def test_svdllm_v2_counts_a_loss_below_e_as_e() -> None:
    """Next to one below 1, whose log is negative, the formula alone would share by its sign."""
    quiet = make_spectra(1, seed=5)[0]
    shape = (60, 60)
    energy = torch.ones(60, dtype=torch.float64)
    spectra = [
        replace(quiet, name=str(i), shape=shape, energy=energy * scale)
        for i, scale in enumerate((1e-6, 1e-2, 1e0))
    ]
    ranks = _svdllm_v2(spectra, 0.6).ranks
    loss = np.sqrt(TOKENS * 42 * np.array([1e-6, 1e-2, 1e0]))  # 42 of 60 beyond rank 18
    assert loss[0] < 1
    score = 1 / np.log(np.maximum(loss, np.e))
    expected = (1 - 0.4 * score / score.mean()) * 30
    assert ((expected > 1) & (expected < 30)).all()
    assert np.abs(np.array(ranks) - expected).max() <= 1


# --- swift


def _swift(spectra: list[Spectrum], ratio: float, weight: float) -> Allocation:
    return allocate("swift", spectra, make_budget(spectra, ratio), importance_weight=weight)


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_swift_shares_half_by_effective_rank_and_importance(weight: float) -> None:
    spectra = make_spectra(6, seed=7)
    ratio = make_budget(spectra, 0.4).parameters / sum(numel(s.shape) for s in spectra)
    ranks = _swift(spectra, 0.4, weight).ranks
    angles = np.array([s.importance for s in spectra])
    importance = 1 + (angles - angles.min()) / (angles.max() - angles.min())
    for kind in ("q", "k", "up"):
        mine = [i for i, s in enumerate(spectra) if s.cluster == kind]
        m, n = matrix_of(spectra[mine[0]].shape)
        density = []
        for i in mine:
            p = np.sqrt(spectra[i].energy.numpy())
            p = p / p.sum()
            density.append(np.exp(-(p * np.log(p)).sum()) / min(m, n))
        score = importance[mine] ** weight * np.array(density) ** (1 - weight)
        uniform = ratio * m * n / (m + n)
        expected = uniform * (0.5 + 0.5 * score / score.mean())
        assert ((expected > 1) & (expected < m * n / (m + n))).all()  # nothing is clipped
        for i, rank in zip(mine, expected, strict=True):
            assert ranks[i] in (int(rank), int(rank) + 1) or is_dense(int(rank) + 1, (m, n))


def test_swift_gives_important_blocks_more_the_more_importance_counts() -> None:
    spectra = make_spectra(8, seed=8)
    top = max(range(len(spectra)), key=lambda i: spectra[i].importance or 0)
    block = [i for i, s in enumerate(spectra) if s.layer == spectra[top].layer]
    given = [sum(_swift(spectra, 0.5, w).ranks[i] for i in block) for w in (0.0, 0.5, 1.0)]
    assert given == sorted(given)
    assert given[0] < given[-1]


def test_swift_names_the_command_that_measures_importance() -> None:
    spectra = make_spectra(2, seed=0)
    spectra[1] = replace(spectra[1], importance=None)
    with pytest.raises(SourceError) as caught:
        _swift(spectra, 0.5, 0.5)
    assert "hisvd calibrate" in caught.value.hint
