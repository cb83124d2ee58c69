"""Matrix products with symmetric results or triangular factors."""

from __future__ import annotations

import torch
from torch import Tensor

from hisvd_cli.linalg.blas import lower_gram as blas_gram
from hisvd_cli.linalg.blas import serves

_STRIPS = 8
_FINE_STRIPS = 16  # for products of two triangular matrices
_LEAST_SIZE = 256  # for smaller matrices, the full product is faster


def congruence(outer: Tensor, inner: Tensor) -> Tensor:
    """Return ``B G Bᵀ`` ``[r, r]`` for B ``[r, n]`` and a symmetric G ``[n, n]``.

    Only the lower triangle is computed, in strips, and mirrored.
    """
    return mirrored_product(outer @ inner, outer)


def gram(rows: Tensor) -> Tensor:
    """Return ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``; only one triangle is computed."""
    return filled(blas_gram(rows)) if _by_blas(rows) else mirrored_product(rows, rows)


def lower_gram(rows: Tensor) -> Tensor:
    """Return ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``; the part above the diagonal is undefined."""
    return blas_gram(rows) if _by_blas(rows) else mirrored_product(rows, rows)


def _by_blas(rows: Tensor) -> bool:
    return len(rows) >= _LEAST_SIZE and serves(rows)


def filled(lower: Tensor) -> Tensor:
    """Mirror the lower triangle of a symmetric matrix ``[r, r]``, in place."""
    for start, end in _strips(len(lower)):
        corner = lower[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        lower[start:end, end:] = lower[end:, start:end].T
    return lower


def mirrored_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``A Bᵀ`` ``[r, r]`` for A and B ``[r, n]``, assuming that it is symmetric."""
    size = len(left)
    if size < _LEAST_SIZE:
        return left @ right.T
    result = left.new_empty(size, size)
    for start, end in _strips(size):
        strip = left[start:] @ right[start:end].T
        result[start:, start:end] = strip
        result[start:end, end:] = strip[end - start :].T
    return result


def triangular_congruence(root: Tensor, inner: Tensor) -> Tensor:
    """Return ``Rᵀ C R`` ``[n, n]`` for a lower triangular R and a symmetric C ``[n, n]``; only the
    lower triangle of C is read.

    With C = S + Sᵀ for a lower triangular S, the result is X + Xᵀ for ``X = Rᵀ (S R)``. S R is
    lower triangular too, so both products together take n³ operations; C R and half of the result
    would take a third more (n = 4096 in float32, two cores: 0.49 s instead of 0.63 s).
    """
    strips = _strips(len(root), _FINE_STRIPS)
    product = _lower_product(inner, root, strips)
    for start, end in strips:
        strip = root[start:, start:end].T @ product[start:, :end]
        corner = strip[:, start:]
        corner += corner.T.clone()
        strip[:, :start] += (root[start:, :start].T @ product[start:, start:end]).T
        # Later strips do not read these rows, so the result overwrites them.
        product[start:end, :end] = strip
        product[:start, start:end] = strip[:, :start].T
    return product


def _lower_product(inner: Tensor, root: Tensor, strips: list[tuple[int, int]]) -> Tensor:
    """Return S R ``[n, n]``; blocks above the diagonal are undefined."""
    product = torch.empty_like(inner)
    for i, (top, bottom) in enumerate(strips):
        rows = inner[top:bottom, :bottom].tril(top)
        rows.diagonal(top).div_(2)
        for start, end in strips[: i + 1]:
            block = product[top:bottom, start:end]
            torch.mm(rows[:, start:], root[start:bottom, start:end], out=block)
    return product


def triangular_product(root: Tensor, right: Tensor) -> Tensor:
    """Return ``R X`` ``[n, k]`` for a lower triangular R ``[n, n]`` and X ``[n, k]``."""
    result = torch.empty_like(right)
    for start, end in _strips(len(root)):
        torch.mm(root[start:end, :end], right[:end], out=result[start:end])
    return result


def orthonormal(columns: Tensor) -> Tensor | None:
    """Orthonormalize nearly orthonormal columns ``[m, k]`` by two Cholesky factorizations
    (CholeskyQR2, Yamamoto et al. 2015). Returns None if a factorization fails."""
    for _ in range(2):
        products = gram(columns.T)
        factor, failed = torch.linalg.cholesky_ex(products, upper=True)
        if int(failed):
            return None
        columns = torch.linalg.solve_triangular(factor, columns, upper=True, left=False)
    return columns


def _strips(size: int, count: int = _STRIPS) -> list[tuple[int, int]]:
    stride = -(-size // count)
    return [(start, min(start + stride, size)) for start in range(0, size, stride)]
