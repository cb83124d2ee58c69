"""Leading eigenvectors, however they are found, against LAPACK's whole decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hisvd_cli.linalg.eigen import leading
from hisvd_cli.linalg.products import (
    congruence,
    filled,
    gram,
    lower_gram,
    mirrored_product,
    orthonormal,
    triangular_congruence,
    triangular_product,
)
from hisvd_cli.linalg.subspace import EXCESS, leading_subspace
from hisvd_cli.linalg.tridiagonal import leading_part
from tests.test_precision import draw, psd


@pytest.mark.parametrize("rank", [1, 7, 20, 39, 40])
def test_leading_eigenvectors_are_those_of_the_whole(rank: int) -> None:
    gram = psd(40, 5)
    values, vectors = leading(gram, rank)
    every, whole = torch.linalg.eigh(gram)
    torch.testing.assert_close(values, every.flip(0)[:rank])
    overlap = (vectors * whole.flip(1)[:, :rank]).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones(rank).double())


@pytest.mark.parametrize("size", [1, 7, 8, 9, 50])
def test_symmetric_products_are_whole(size: int) -> None:
    outer, inner = draw(size, 30), psd(30, 1)
    torch.testing.assert_close(congruence(outer, inner), outer @ inner @ outer.T)
    torch.testing.assert_close(mirrored_product(outer, outer), outer @ outer.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("size", [1, 40, 256, 300])
def test_a_matrix_by_its_own_transpose(size: int, dtype: torch.dtype) -> None:
    rows = draw(size, 30).to(dtype)
    exact = rows.double() @ rows.double().T
    tolerance = 300 * torch.finfo(dtype).eps
    for read in (rows, rows.T.contiguous().T, torch.stack([rows, rows], -1)[..., 0]):
        made = gram(read)
        torch.testing.assert_close(made.double(), exact, rtol=0, atol=tolerance)
        torch.testing.assert_close(made, made.T)
    assert torch.equal(gram(rows[:, :0]), torch.zeros(size, size, dtype=dtype))


SPECTRA = {
    "flat": torch.linspace(1, 0.9, 120),
    "falling": torch.logspace(0, -6, 120),
    "steep": torch.logspace(0, -14, 120),
    "outliers": torch.cat([torch.tensor([1e5, 1e4]), torch.linspace(1, 0.1, 118)]),
    "step": torch.cat([torch.full((30,), 2.0), torch.linspace(0.5, 0.4, 90)]),
    "singular": torch.cat([torch.linspace(1, 0.5, 60), torch.zeros(60)]),
}


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(draw(len(values), len(values), seed=seed)).Q
    matrix: Tensor = basis * values.double() @ basis.T
    return (matrix + matrix.T) / 2


def excess_of(gram: Tensor, vectors: Tensor, rank: int) -> float:
    """Return by what share the loss of a projection lies above the least one, both in float64."""
    every = torch.linalg.eigvalsh(gram).flip(0)
    basis = torch.linalg.qr(vectors.double()).Q
    kept = float((basis * (gram @ basis)).sum())
    return (float(every.sum()) - kept) / float(every[rank:].sum()) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 13, 50, 119, 120])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_part_is_that_of_the_whole_or_refused(name: str, rank: int, dtype: torch.dtype) -> None:
    gram = with_spectrum(SPECTRA[name])
    found = leading_part(gram.to(dtype), rank)
    if found is None:  # equal eigenvalues have no vectors of their own
        assert name in ("singular", "step")
        return
    values, vectors = found
    rounding = 200 * torch.finfo(dtype).eps
    every = torch.linalg.eigvalsh(gram).flip(0)[:rank]
    torch.testing.assert_close(values.double(), every, rtol=0, atol=rounding * float(every[0]))
    products = vectors.double().T @ vectors.double()
    torch.testing.assert_close(products, torch.eye(rank).double(), rtol=0, atol=1e-3)
    residual = gram @ vectors.double() - vectors.double() * values.double()
    assert float(residual.abs().max()) <= rounding * float(every[0])


@pytest.mark.parametrize(
    "gram",
    [torch.eye(50), torch.zeros(50, 50), torch.ones(50, 50), torch.full((50, 50), torch.nan)],
)
def test_what_has_no_vectors_of_its_own_is_refused(gram: Tensor) -> None:
    assert leading_part(gram, 10) is None


def test_a_diagonal_matrix_has_its_axes() -> None:
    found = leading_part(torch.diag(torch.arange(50.0)), 10)
    assert found is not None
    torch.testing.assert_close(found[0], torch.arange(49.0, 39.0, -1))
    torch.testing.assert_close(found[1].abs(), torch.eye(50).flip(1)[:, :10])


@pytest.mark.parametrize("rank", [3, 13, 50])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_subspace_loses_a_thousandth_at_most_or_is_refused(name: str, rank: int) -> None:
    gram = with_spectrum(SPECTRA[name])
    found = leading_subspace(gram, rank)
    if found is None:
        assert name != "falling"
        return
    vectors = found[1]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank).double(), rtol=0, atol=1e-9)
    assert -1e-9 <= excess_of(gram, vectors, rank) <= EXCESS


@pytest.mark.parametrize("name", ["flat", "steep", "singular"])
@pytest.mark.parametrize("solver", ["partial", "subspace"])
def test_where_a_way_is_refused_all_are_found(solver: str, name: str) -> None:
    gram = with_spectrum(SPECTRA[name])
    _, vectors = leading(gram, 50, solver)  # type: ignore[arg-type]
    every = torch.linalg.eigvalsh(gram).flip(0)
    lost = float(every.sum() - (vectors * (gram @ vectors)).sum())
    assert lost == pytest.approx(float(every[50:].sum()), rel=EXCESS, abs=1e-12)


def test_products_with_a_triangle_leave_nothing_out() -> None:
    root, inner, right = draw(43, 43, seed=1).tril(), psd(43, 2), draw(43, 7, seed=3)
    torch.testing.assert_close(triangular_product(root, right), root @ right)
    expected = root.T @ inner @ root
    torch.testing.assert_close(triangular_congruence(root, inner), expected)
    above = torch.full_like(inner, math.nan).triu(1)
    torch.testing.assert_close(triangular_congruence(root, inner.tril() + above), expected)


@pytest.mark.parametrize("count", [40, 300])
def test_half_a_product_stands_for_all_of_it(count: int) -> None:
    rows = draw(count, 50, seed=1)
    for each in (rows, draw(50, count, seed=2).T):
        torch.testing.assert_close(lower_gram(each).tril(), (each @ each.T).tril())
        torch.testing.assert_close(filled(lower_gram(each)), each @ each.T)


def test_nearly_orthonormal_columns_are_made_orthonormal() -> None:
    columns = torch.linalg.qr(draw(60, 20)).Q @ (torch.eye(20) + 0.02 * draw(20, 20, seed=4))
    made = orthonormal(columns)
    assert made is not None
    torch.testing.assert_close(made.T @ made, torch.eye(20).double())
    torch.testing.assert_close(made @ (made.T @ columns), columns)
    assert orthonormal(torch.ones(60, 20)) is None
