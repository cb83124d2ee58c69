"""Properties that hold for any input: budgets, merging of settings, rows in files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hisvd_cli.allocation.budget import Budget, break_even, cost, full_rank, rank_of_share
from hisvd_cli.modeling.hidden_states import StatesHome
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from hisvd_cli.modeling.layers.shapes import Shape
from hisvd_cli.modeling.rows import RowFiles
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.settings import Settings, flag_of
from hisvd_cli.utils.errors import SourceError
from tests.allocation import choices

some = settings(max_examples=100, derandomize=True, database=None, deadline=None)

_SIDE = st.integers(2, 60)
PLAIN = st.tuples(_SIDE, _SIDE)
STACK = st.tuples(st.integers(1, 9), _SIDE, _SIDE)
SHAPE: st.SearchStrategy[Shape] = st.one_of(PLAIN, STACK)
STORAGE: st.SearchStrategy[Storage] = st.sampled_from(list(LAYERS))


@some
@given(SHAPE, STORAGE)
def test_cost_rises_with_rank_up_to_that_of_the_matrix(shape: Shape, storage: Storage) -> None:
    costs = [cost(rank, shape, storage) for rank in range(1, full_rank(shape) + 1)]
    assert all(low <= high for low, high in pairwise(costs))
    assert costs[-1] == prod(shape)


@some
@given(SHAPE, STORAGE, st.floats(0, 1))
def test_a_rank_of_a_share_costs_that_share(shape: Shape, storage: Storage, share: float) -> None:
    rank, entries = rank_of_share(share, shape, storage), prod(shape)
    assert 0 <= rank <= full_rank(shape) + 1e-9
    if rank > 0:
        assert cost(rank, shape, storage) == pytest.approx(share * entries, rel=1e-6)
    else:
        pivoted = storage == "pivoted" and len(shape) == 2
        assert share * entries <= (shape[0] if pivoted else 0)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Budget, list[torch.Tensor]]:
    """Draw a budget that its floors leave something of, and energies for its layers."""
    shapes = draw(st.lists(SHAPE, min_size=1, max_size=6))
    floors = [draw(st.integers(1, full_rank(shape))) for shape in shapes]
    storage: Storage = draw(STORAGE)
    least = sum(int(cost(r, s, storage)) for r, s in zip(floors, shapes, strict=True))
    most = sum(map(prod, shapes))
    budget = Budget(shapes, draw(st.integers(least, max(least, most))), floors, 1, storage)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    energies = [
        torch.rand(full_rank(s), generator=generator, dtype=torch.float64).sort(descending=True)[0]
        for s in shapes
    ]
    return budget, energies


@some
@given(budgets(), st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
def test_whole_ranks_keep_the_budget_and_their_floors(
    drawn: tuple[Budget, list[torch.Tensor]], wishes: list[float]
) -> None:
    budget, energies = drawn
    baselines = [w * break_even(s) for w, s in zip(wishes, budget.shapes, strict=False)]
    real = budget.scaled(baselines)
    ranks = budget.rounded(real, energies)
    assert budget.spent(ranks) <= budget.parameters
    for rank, floor, shape in zip(ranks, budget.floors, budget.shapes, strict=True):
        assert floor <= rank <= full_rank(shape)
    # Nothing is left that would buy one more rank somewhere.
    for i, (rank, shape) in enumerate(zip(ranks, budget.shapes, strict=True)):
        if rank < full_rank(shape):
            more = [*ranks[:i], rank + 1, *ranks[i + 1 :]]
            assert budget.spent(more) > budget.parameters


def greedily(budget: Budget, energies: list[torch.Tensor]) -> list[int]:
    """Return ranks from the floors up, by a search of all affordable steps at each step."""
    options = [
        choices(shape, floor, budget.multiple_of, budget.storage)
        for shape, floor in zip(budget.shapes, budget.floors, strict=True)
    ]
    ranks = [min(prices) for prices in options]
    left = budget.parameters - sum(prices[min(prices)] for prices in options)
    saved = [energy.tolist() for energy in energies]
    while True:
        offers = []
        for i, (prices, rank) in enumerate(zip(options, ranks, strict=True)):
            above = [r for r in prices if r > rank]
            if above and (price := prices[min(above)] - prices[rank]) <= left:
                gain = sum(saved[i][rank : min(above)])
                offers.append((gain / price, i, min(above), price))
        if not offers:
            return ranks
        _, i, following, price = max(offers)
        ranks[i], left = following, left - price


@some
@given(budgets(), st.integers(1, 9))
def test_filling_takes_the_most_energy_per_parameter_first(
    drawn: tuple[Budget, list[torch.Tensor]], multiple_of: int
) -> None:
    budget, energies = replace(drawn[0], multiple_of=multiple_of), drawn[1]
    filled = budget.filled(budget.floors, energies)
    assert filled == greedily(budget, energies)
    assert budget.filled(filled, energies) == filled


@some
@given(budgets(), st.lists(st.floats(0.01, 100), min_size=6, max_size=6), st.data())
def test_a_stack_is_as_many_plain_layers_of_one_rank(
    drawn: tuple[Budget, list[torch.Tensor]], wishes: list[float], data: st.DataObject
) -> None:
    """Its storage is plain pairs whatever that of the others, so that those are compared alone."""
    budget, _ = drawn
    counts = [shape[0] if len(shape) == 3 else 1 for shape in budget.shapes]
    ranks = [data.draw(st.integers(1, full_rank(shape))) for shape in budget.shapes]
    experts: list[Shape] = [(s[-2], s[-1]) for s in budget.shapes]
    kinds: list[Storage] = ["pair" if len(s) == 3 else budget.storage for s in budget.shapes]
    each = [cost(r, s, kind) for r, s, kind in zip(ranks, experts, kinds, strict=True)]
    assert budget.spent(ranks) == sum(e * c for e, c in zip(each, counts, strict=True))
    if len(set(kinds)) > 1:
        return

    def repeated(values: list[Any]) -> list[Any]:
        return [v for v, count in zip(values, counts, strict=True) for _ in range(count)]

    floors = repeated(list(budget.floors))
    apart = Budget(repeated(experts), budget.parameters, floors, 1, kinds[0])
    together = Budget(budget.shapes, budget.parameters, budget.floors, 1, kinds[0])
    assert apart.shares(repeated(ranks)) == repeated(together.shares(ranks))
    baselines = wishes[: len(counts)]
    scaled = together.scaled(baselines)
    assert apart.scaled(repeated(baselines)) == pytest.approx(repeated(scaled), rel=1e-6)


VALUES: dict[Key, st.SearchStrategy[Any]] = {
    ("plan", "ratio"): st.lists(st.sampled_from([0.9, 0.7, 0.5]), min_size=1, unique=True),
    ("plan", "multiple_of"): st.integers(1, 64),
    ("calibration", "samples"): st.integers(1, 512),
    ("calibration", "seed"): st.integers(0, 2**32),
    ("compress", "evaluate"): st.booleans(),
    ("model", "revision"): st.text("abcdef0123456789", min_size=7, max_size=9),
}
LAYER = st.fixed_dictionaries({}, optional=VALUES)


def toml(layer: dict[Key, Any]) -> str:
    lines = {section: f"[{section}]\n" for section, _ in layer}
    for (section, key), value in layer.items():
        text = f'"{value}"' if isinstance(value, str) else str(value).lower()
        lines[section] += f"{key} = {text}\n"
    return "".join(lines.values())


def variables(layer: dict[Key, Any]) -> dict[str, str]:
    return {
        f"HISVD_{section}_{key}".upper(): str(value).strip("[]")
        for (section, key), value in layer.items()
    }


@some
@given(LAYER, LAYER, LAYER)
def test_the_strongest_source_of_each_setting_decides(
    profile: dict[Key, Any], environment: dict[Key, Any], flags: dict[Key, Any]
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "hisvd.toml"
        path.write_text(toml(profile), encoding="utf-8")
        found = resolve(flags, None, (), variables(environment), Path(folder))
    defaults = Settings()
    for section, key in VALUES:
        sources = [
            (flags, flag_of(section, key)),
            (environment, f"HISVD_{section}_{key}".upper()),
            (profile, str(path)),
        ]
        chosen = [(layer, name) for layer, name in sources if (section, key) in layer]
        if chosen:
            layer, name = chosen[0]
            assert found.value(section, key) == layer[section, key]
            assert found.origins[section, key] == name
        else:
            assert found.value(section, key) == getattr(getattr(defaults, section), key)
            assert (section, key) not in found.origins


@some
@given(st.data(), st.integers(1, 12))
def test_rows_come_back_however_they_were_divided(data: st.DataObject, count: int) -> None:
    rows = torch.rand(count, 3, generator=torch.Generator().manual_seed(count))
    span = st.tuples(st.integers(0, count), st.integers(0, count)).map(sorted)
    spans = [each for each in data.draw(st.lists(span, max_size=5)) if each[0] < each[1]]
    start, end = data.draw(span)
    assume(start < end)
    covered = {row for first, last in spans for row in range(first, last)}
    with TemporaryDirectory() as folder:
        files = RowFiles(Path(folder), "states")
        for first, last in spans:
            files.keep(first, rows[first:last], StatesHome(torch.device("cpu")))
        assert files.sound(count) == (covered == set(range(count)))
        if covered >= set(range(start, end)):
            assert torch.equal(files.read(start, end), rows[start:end])
        else:
            with pytest.raises(SourceError, match="lacks rows"):
                files.read(start, end)
