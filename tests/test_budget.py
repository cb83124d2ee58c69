"""Budgets: never above, hardly below, and the remainder where it saves most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hisvd_cli.allocation.budget import (
    Budget,
    break_even,
    cost,
    full_rank,
    is_dense,
    rank_of_share,
)
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from hisvd_cli.modeling.layers.shapes import Shape, matrix_of
from hisvd_cli.utils.errors import BudgetError
from tests.allocation import choices

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 6


def _energies(shapes: list[tuple[int, int]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(min(s), generator=generator, dtype=torch.float64) for s in shapes]
    return [draw.sort(descending=True).values for draw in draws]


def test_a_pair_at_break_even_costs_what_the_matrix_does() -> None:
    for shape in [(576, 192), (7, 7), (30, 1000)]:
        m, n = matrix_of(shape)
        assert cost(break_even(shape), shape) == pytest.approx(m * n)
        below = int(break_even(shape) - 1e-9)
        assert not is_dense(below, shape)
        assert is_dense(below + 1, shape)
        assert cost(full_rank(shape), shape) == m * n


@pytest.mark.parametrize("shape", [(576, 192), (192, 576), (64, 64), (30, 1000)])
def test_pivoted_pairs_hold_more_rank_and_break_even_just_below_full(shape: Shape) -> None:
    m, n = matrix_of(shape)
    for rank in range(1, full_rank(shape)):
        numbers = rank * n + (m - rank) * rank + m
        assert is_dense(rank, shape, "pivoted") == (numbers >= m * n)
        assert cost(rank, shape, "pivoted") == min(numbers, m * n)
    assert cost(full_rank(shape), shape, "pivoted") == m * n
    assert not is_dense(full_rank(shape) - int(m**0.5) - 1, shape, "pivoted")


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("shape", [(576, 192), (192, 576), (64, 64)])
def test_a_share_pays_for_its_rank(shape: Shape, storage: Storage) -> None:
    m, n = matrix_of(shape)
    for share in (0.2, 0.5, 0.8, 0.97):
        rank = rank_of_share(share, shape, storage)
        assert cost(rank, shape, storage) == pytest.approx(share * m * n)
        assert rank_of_share(share, shape) == pytest.approx(share * m * n / (m + n))
    assert rank_of_share(0.0, shape, storage) == 0


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.6, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("storage", LAYERS)
def test_plans_meet_the_budget(ratio: float, multiple_of: int, storage: Storage) -> None:
    total = sum(m * n for m, n in SHAPES)
    floors = [multiple_of] * len(SHAPES)
    budget = Budget(SHAPES, int(ratio * total), floors, multiple_of, storage)
    generator = torch.Generator().manual_seed(3)
    wishes = [float(x) + 0.1 for x in torch.rand(len(SHAPES), generator=generator)]
    baselines = [w * break_even(s) for w, s in zip(wishes, SHAPES, strict=True)]
    ranks = budget.rounded(budget.scaled(baselines), _energies(SHAPES, 4))
    spent = sum(int(cost(r, s, storage)) for r, s in zip(ranks, SHAPES, strict=True))
    assert spent <= budget.parameters
    dense = [is_dense(r, s, storage) for r, s in zip(ranks, SHAPES, strict=True)]
    truncated = [rs for rs, d in zip(zip(ranks, SHAPES, strict=True), dense, strict=True) if not d]
    if multiple_of == 1:
        assert budget.parameters - spent <= 0.0005 * total
    elif truncated:
        # No further step fits: that is all that rounding may leave.
        assert budget.parameters - spent < multiple_of * max(sum(s) for _, s in truncated)
    assert all(r % multiple_of == 0 for r, _ in truncated)
    assert all(r == full_rank(s) for r, s, d in zip(ranks, SHAPES, dense, strict=True) if d)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60)), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
    st.integers(1, 16),
    st.sampled_from(list(LAYERS)),
)
def test_less_is_left_than_one_step_of_any_truncated_layer_costs(
    shapes: list[tuple[int, int]], ratio: float, multiple_of: int, storage: Storage
) -> None:
    """What the manual promises: for tiny models and large steps too, where 0.05 % does not hold."""
    total = sum(m * n for m, n in shapes)
    floors = [min(multiple_of, full_rank(s)) for s in shapes]
    try:
        budget = Budget(shapes, int(ratio * total), floors, multiple_of, storage)
    except BudgetError:
        return
    ranks = budget.rounded(budget.scaled([1.0] * len(shapes)), _energies(shapes, 4))
    left = budget.parameters - budget.spent(ranks)
    pairs = zip(ranks, shapes, strict=True)
    truncated = [shape for rank, shape in pairs if rank < full_rank(shape)]
    assert 0 <= left < min((multiple_of * sum(s) for s in truncated), default=1 + left)


def test_ratio_one_keeps_everything_dense() -> None:
    budget = Budget(SHAPES, sum(m * n for m, n in SHAPES), [1] * len(SHAPES))
    ranks = budget.rounded(budget.scaled([1.0] * len(SHAPES)), _energies(SHAPES, 0))
    assert ranks == [full_rank(s) for s in SHAPES]


@pytest.mark.parametrize("seed", range(5))
def test_the_remainder_goes_where_it_saves_most(seed: int) -> None:
    """Filling from floors is the best of all plans that cost as much, by exhaustive search.

    The greedy choice is optimal here because energies fall and every step costs the same.
    """
    shapes = [(12, 12)] * 3
    energies = [(1 + i) * e for i, e in enumerate(_energies(shapes, seed))]
    budget = Budget(shapes, 7 * 24, [1, 1, 1])  # four steps, too few for a layer to become dense

    def loss(choice: Sequence[int]) -> float:
        return sum(float(e[r:].sum()) for r, e in zip(choice, energies, strict=True))

    affordable = [c for c in itertools.product(range(1, 6), repeat=3) if sum(c) * 24 <= 7 * 24]
    best = min(affordable, key=loss)
    assert budget.filled([1, 1, 1], energies) == list(best)
    assert budget.rounded([1.0, 1.0, 1.0], energies) == list(best)


def test_floors_above_the_budget_say_by_how_much() -> None:
    with pytest.raises(BudgetError, match="take 120 parameters, 20 more than the budget of 100"):
        Budget([(10, 10)] * 3, 100, [2] * 3)


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_scaled_ranks_spend_the_budget_in_proportion(ratio: float, storage: Storage) -> None:
    shapes = [(60, 40), (20, 50), (50, 50), (64, 16)]
    total = sum(m * n for m, n in shapes)
    baselines = [3.0, 1.0, 2.0, 8.0]
    budget = Budget(shapes, int(ratio * total), [2, 2, 2, 2], 1, storage)
    ranks = budget.scaled(baselines)
    spent = sum(cost(rank, shape) for rank, shape in zip(ranks, shapes, strict=True))
    assert spent == pytest.approx(budget.parameters, rel=1e-9)
    floors = [budget.cost(2, shape) / sum(shape) for shape in shapes]
    assert all(rank >= floor for rank, floor in zip(ranks, floors, strict=True))
    scales = [
        rank / baseline
        for rank, baseline, floor, shape in zip(ranks, baselines, floors, shapes, strict=True)
        if floor < rank < break_even(shape)
    ]
    assert len(scales) >= 2
    assert scales == pytest.approx([scales[0]] * len(scales))


@pytest.mark.parametrize(
    ("options", "ranks"),
    [({}, [4, 2, 2, 2]), ({"nearest": False}, [4, 2, 2, 2]), ({"nearest": True}, [3, 3, 2, 2])],
)
def test_nearest_ranks_move_by_one_step(options: dict[str, bool], ranks: list[int]) -> None:
    shapes = [(10, 10)] * 4
    weights = [1000.0, 10.0, 1.0, 1.0]
    energies = [w * torch.ones(10, dtype=torch.float64) for w in weights]
    budget = Budget(shapes, 200, [1] * 4)
    assert budget.rounded([2.5] * 4, energies, **options) == ranks
    assert budget.settled([2.5] * 4, energies, **options) == ranks


def test_rounding_errors_cost_no_rank() -> None:
    """The third layer has the most energy, so that it would get any rank that the others lose."""
    shapes = [(7, 7)] * 3  # break-even at rank 3.5; a step costs 14 parameters
    energies = [w * torch.ones(7, dtype=torch.float64) for w in (1.0, 1.0, 1000.0)]
    budget = Budget(shapes, 49 + 28 + 14 + 7, [1] * 3)
    for error in (-1e-12, 0.0, 1e-12):
        ranks = [3.5 + error, 2 + error, 1 + error]
        assert budget.rounded(ranks, energies) == [7, 2, 1]
        assert budget.settled(ranks, energies) == [7, 2, 1]


@pytest.mark.parametrize("storage", LAYERS)
def test_nearest_ranks_cost_the_shares_of_the_real_ones(storage: Storage) -> None:
    """Each is the largest rank that costs at most its share, or the next one."""
    shapes = [(40, 30)] * 4
    energies = [w * e for w, e in zip([1e3, 1.0, 1.0, 1.0], _energies(shapes, 6), strict=True)]
    budget = Budget(shapes, 3000, [1] * 4, 1, storage)
    real = budget.scaled([2.0, 3.0, 4.0, 6.0])
    ranks = budget.rounded(real, energies, nearest=True)
    for rank, wanted, shape in zip(ranks, real, shapes, strict=True):
        prices = choices(shape, storage=storage)
        below = max(r for r, price in prices.items() if price <= wanted * sum(shape) + 1e-6)
        assert rank in (below, below + 1)
