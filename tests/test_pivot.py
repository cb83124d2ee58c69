"""Pivoted pairs: the same product, from fewer numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hisvd_cli.linalg.pivoting import pivoted


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rebuilt(v: Tensor, c: Tensor, order: Tensor) -> Tensor:
    return torch.cat([v, c @ v])[order.long()]


@pytest.mark.parametrize(("m", "rank", "n"), [(12, 5, 20), (40, 39, 8), (30, 1, 30), (200, 90, 64)])
def test_the_product_stays_the_same(m: int, rank: int, n: int) -> None:
    u, v = draw(m, rank), draw(rank, n, seed=1)
    rows, coefficients, order = pivoted(u, v)
    assert rows.shape == (rank, n)
    assert coefficients.shape == (m - rank, rank)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(m))
    torch.testing.assert_close(rebuilt(rows, coefficients, order), u @ v, rtol=1e-10, atol=1e-10)


def test_stored_rows_are_rows_of_the_product_and_make_the_others() -> None:
    """By least squares with numpy, which knows nothing of pivots."""
    u, v = draw(24, 7), draw(7, 30, seed=1)
    rows, coefficients, order = pivoted(u, v)
    product = (u @ v).numpy()
    places = order.argsort().numpy()
    np.testing.assert_allclose(rows.numpy(), product[places[:7]], rtol=1e-10, atol=1e-12)
    solved = np.linalg.lstsq(product[places[:7]].T, product[places[7:]].T, rcond=None)[0]
    np.testing.assert_allclose(coefficients.numpy(), solved.T, rtol=1e-8, atol=1e-10)


def test_coefficients_stay_small_where_the_first_rows_would_not_do() -> None:
    """The first rows of U are all but alike: taken as they come, they give coefficients of 1e8."""
    u, v = draw(64, 16), draw(16, 64, seed=1)
    u[1:16] = u[0] + 1e-8 * u[1:16]
    rows, coefficients, order = pivoted(u, v)
    assert torch.linalg.solve(u[:16].T, u[16:].T).abs().max() > 1e6
    assert coefficients.abs().max() < 4
    torch.testing.assert_close(rebuilt(rows, coefficients, order), u @ v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["zero", "zero column", "equal columns", "equal rows"])
def test_factors_of_less_than_their_rank_need_no_inverse(kind: str) -> None:
    u, v = draw(20, 6), draw(6, 15, seed=1)
    if kind == "zero":
        u.zero_()
    elif kind == "zero column":
        u[:, 2] = 0
    elif kind == "equal columns":
        u[:, 4] = u[:, 1]
    else:
        u[:] = u[0]
    made = pivoted(u, v)
    assert all(bool(tensor.isfinite().all()) for tensor in made)
    torch.testing.assert_close(rebuilt(*made), u @ v, rtol=1e-9, atol=1e-9)
