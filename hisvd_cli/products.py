"""Products of matrices of which part is known beforehand: a mirror, or zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from hisvd_cli.blas import serves, upper_gram

_STRIPS = 8
_LEAST_SIZE = 256  # a smaller mirror costs more than the half that it saves


def congruence(outer: Tensor, inner: Tensor) -> Tensor:
    """Return ``B G Bᵀ`` ``[r, r]`` for B ``[r, n]`` and a symmetric G ``[n, n]``.

    Only its lower triangle is multiplied out, in strips; the upper one is its mirror.
    """
    return mirrored_product(outer @ inner, outer)


def gram(rows: Tensor) -> Tensor:
    """Return ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``; no more than a triangle is multiplied out."""
    if len(rows) < _LEAST_SIZE or not serves(rows):
        return mirrored_product(rows, rows)
    result = upper_gram(rows)
    for start, end in _strips(len(rows)):
        corner = result[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        result[end:, start:end] = result[start:end, end:].T
    return result


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
    """Return ``Rᵀ C R`` ``[n, n]`` for a lower triangular R and a symmetric C ``[n, n]``: the zeros
    of R, and the upper half of the result, are left out."""
    size = len(root)
    product = torch.empty_like(inner)
    for start, end in _strips(size):
        torch.mm(inner[:, start:], root[start:, start:end], out=product[:, start:end])
    result = torch.empty_like(inner)
    for start, end in _strips(size):
        strip = root[start:, start:end].T @ product[start:, :end]
        result[start:end, :end] = strip
        result[:start, start:end] = strip[:, :start].T
    return result


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


def _strips(size: int) -> list[tuple[int, int]]:
    stride = -(-size // _STRIPS)
    return [(start, min(start + stride, size)) for start in range(0, size, stride)]
