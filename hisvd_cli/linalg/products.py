"""Products of matrices of which part is known beforehand: a mirror, or zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from hisvd_cli.linalg.blas import lower_gram as blas_gram
from hisvd_cli.linalg.blas import serves

_STRIPS = 8
_FINE_STRIPS = 16  # of what is a triangle on both sides
_LEAST_SIZE = 256  # a smaller mirror costs more than the half that it saves


def congruence(outer: Tensor, inner: Tensor) -> Tensor:
    """Return ``B G Bᵀ`` ``[r, r]`` for B ``[r, n]`` and a symmetric G ``[n, n]``.

    Only its lower triangle is multiplied out, in strips; the upper one is its mirror.
    """
    return mirrored_product(outer @ inner, outer)


def gram(rows: Tensor) -> Tensor:
    """Return ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``; no more than a triangle is multiplied out."""
    return filled(blas_gram(rows)) if _by_blas(rows) else mirrored_product(rows, rows)


def lower_gram(rows: Tensor) -> Tensor:
    """Return ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``, of which only the triangle on and below the
    diagonal is sure to be it."""
    return blas_gram(rows) if _by_blas(rows) else mirrored_product(rows, rows)


def _by_blas(rows: Tensor) -> bool:
    return len(rows) >= _LEAST_SIZE and serves(rows)


def filled(lower: Tensor) -> Tensor:
    """Return the symmetric matrix ``[r, r]`` of which the lower triangle is given, in its place."""
    for start, end in _strips(len(lower)):
        corner = lower[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        lower[start:end, end:] = lower[end:, start:end].T
    return lower


def mirrored_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``A Bᵀ`` ``[r, r]``, known to be symmetric, for A and B ``[r, n]``."""
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
    """Return ``Rᵀ C R`` ``[n, n]`` for a lower triangular R and a symmetric C ``[n, n]``, of which
    what is above the diagonal is not looked at.

    With C = S + Sᵀ for a lower triangular S it is X + Xᵀ of ``X = Rᵀ (S R)``. S R is lower
    triangular as well, so that both products take n³ operations, where C R and half the result take
    a third more (n = 4096 in float32, two cores: 0.49 instead of 0.63 s).
    """
    strips = _strips(len(root), _FINE_STRIPS)
    product = _lower_product(inner, root, strips)
    for start, end in strips:
        strip = root[start:, start:end].T @ product[start:, :end]
        corner = strip[:, start:]
        corner += corner.T.clone()
        strip[:, :start] += (root[start:, :start].T @ product[start:, start:end]).T
        # No later strip needs these rows: the result takes their place.
        product[start:end, :end] = strip
        product[:start, start:end] = strip[:, :start].T
    return product


def _lower_product(inner: Tensor, root: Tensor, strips: list[tuple[int, int]]) -> Tensor:
    """Return the blocks ``[n, n]`` on and below the diagonal of S R, any numbers above them."""
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
    """Return orthonormal columns ``[m, k]`` of the same span, from nearly orthonormal ones: twice
    by Cholesky's factor (CholeskyQR2, Yamamoto and others 2015). None where they are not."""
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
