"""Bootstrap intervals against those of scipy, which draws its own random numbers."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import bootstrap

from hisvd_cli.evaluation.intervals import (
    BLOCK,
    FEWEST_UNITS,
    FEWEST_WINDOWS,
    block_sums,
    interval,
    resampled,
    units,
)


def sums(windows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(windows, blocks, dtype=torch.float64, generator=generator)


def test_blocks_hold_every_token_once() -> None:
    values = torch.rand(2, 2 * BLOCK + 5)
    made = block_sums(values)
    assert made.shape == (2, 3)
    assert made[1, 1] == values[1, BLOCK : 2 * BLOCK].double().sum()
    assert made[0, 2] == values[0, 2 * BLOCK :].double().sum()


@pytest.mark.parametrize(("windows", "blocks"), [(4, 7), (40, 3)])
def test_intervals_are_those_of_scipy(windows: int, blocks: int) -> None:
    above, below = sums(windows, blocks), 1 + sums(windows, blocks, 1)
    found = interval(resampled(above, below))
    assert found is not None
    per_window = windows >= FEWEST_WINDOWS
    one, two = (x.sum(1).numpy() if per_window else x.flatten().numpy() for x in (above, below))
    made = bootstrap(
        (one, two),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=7,
    )
    low, high = made.confidence_interval
    assert found == pytest.approx((low, high), abs=0.06 * (high - low))


def test_the_draws_are_seeded() -> None:
    again = [interval(resampled(sums(3, 4), sums(3, 4, 1))) for _ in range(2)]
    assert again[0] == again[1]


def test_windows_are_drawn_where_there_are_enough() -> None:
    assert len(units(sums(FEWEST_WINDOWS, 3))) == FEWEST_WINDOWS
    assert len(units(sums(FEWEST_WINDOWS - 1, 3))) == 3 * (FEWEST_WINDOWS - 1)


def test_no_interval_of_too_few_units_or_of_what_is_not_finite() -> None:
    few = sums(1, FEWEST_UNITS - 1)
    assert resampled(few, few) is None
    assert interval(None) is None
    broken = sums(4, 4)
    broken[2, 2] = torch.nan
    assert interval(resampled(broken, sums(4, 4))) is None
