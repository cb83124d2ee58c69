"""Leading eigenvectors of a large symmetric matrix on a CPU, by tridiagonal reduction.

LAPACK reduces the matrix to a tridiagonal T and computes its eigenvalues. Each wanted eigenvector
of T is computed by a twisted factorization of ``T − λI`` (Dhillon and Parlett 2004) and transformed
back by the reflections of the reduction. LAPACK's drivers for a subset of vectors orthogonalize
them one by one; beyond a third of all vectors they take longer than computing all.

Eigenvalues that rounding cannot separate would give the same vector twice. This is detected, and
nothing is returned then.

Legend: A ``[p, p]`` = Q T Qᵀ, k wanted vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hisvd_cli.utils.prefetch import ahead

_ARRAY_BYTES = 30 << 20
"""Size of the array of vectors computed together. Large, because the cost is dominated by numpy
calls per row of T, but below the size that malloc requests from the system on every call."""
_MIXTURES = 8
_SKEW = 1e-3
"""Allowed deviation from orthonormality, measured on random combinations of the vectors. Rounding
in float32 causes about 1e-5, a duplicate vector about 1."""


def leading_part(gram: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the largest eigenvalues ``[k]`` and their eigenvectors ``[p, k]``, descending.

    Args:
        gram: A ``[p, p]``, symmetric, in float32 or float64 on a CPU.
        rank: k, at least 1 and at most p.

    Returns:
        Values and vectors in the dtype of A; None if vectors are not orthogonal, or A is not
        finite.
    """
    from scipy.linalg import LinAlgError, eigvalsh_tridiagonal, get_lapack_funcs

    size = len(gram)
    (reduce,) = get_lapack_funcs(("sytrd",), (gram.numpy(),))
    # LAPACK is column-major: the transpose, which is the same matrix, is passed without a copy.
    packed, diagonal, off_diagonal, scales, failed = reduce(
        gram.numpy().T, lower=1, lwork=64 * size
    )
    if failed:
        return None
    diagonal, off_diagonal = diagonal.astype("float64"), off_diagonal.astype("float64")
    try:
        values = eigvalsh_tridiagonal(diagonal, off_diagonal, lapack_driver="sterf")[::-1][:rank]
    except (LinAlgError, ValueError):  # no convergence, or non-finite values
        return None
    vectors, together = gram.new_empty(size, rank), max(1, _ARRAY_BYTES // (8 * size))
    reflections = torch.from_numpy(packed)[1:, :-1], torch.from_numpy(scales)

    def twisted(span: slice) -> Tensor:
        return torch.from_numpy(_twisted_vectors(diagonal, off_diagonal, values[span])).to(
            gram.dtype
        )

    spans = [slice(start, start + together) for start in range(0, rank, together)]
    for span, inner in ahead(twisted, spans):
        # The reflections do not change the first row.
        vectors[0, span] = inner[0]
        vectors[1:, span] = torch.ormqr(*reflections, inner[1:])
    # A duplicate vector changes every random combination.
    mixtures = torch.randn(rank, _MIXTURES, generator=torch.Generator().manual_seed(0))
    mixtures = mixtures.to(gram.dtype)
    skew = float((vectors.T @ (vectors @ mixtures) - mixtures).abs().max())
    if not skew < _SKEW:
        return None
    return torch.from_numpy(values.copy()).to(gram.dtype), vectors


def _twisted_vectors(diagonal: Any, off_diagonal: Any, values: Any) -> Any:
    """Return unit eigenvectors of T, one per column, for given eigenvalues.

    For each λ, ``T − λI`` is factored from both ends, D⁺ downward and D⁻ upward. At the index with
    the smallest pivot γ = D⁺ + D⁻ − (T − λI) the vector has a large entry; the other entries follow
    outward from there, by one product each. The residual is γ, so λ need not be refined.

    Args:
        diagonal: diagonal of T ``[p]``, numpy float64 like the other arrays.
        off_diagonal: off-diagonal of T ``[p − 1]``.
        values: λ ``[k]``.
    """
    import numpy as np

    size, squares, step = len(diagonal), off_diagonal**2, np.empty(len(values))
    down = diagonal[:, None] - values
    up = down.copy()
    # A zero pivot makes the next one infinite; the one after that is regular again.
    with np.errstate(all="ignore"):
        for i in range(1, size):
            down[i] -= np.divide(squares[i - 1], down[i - 1], out=step)
        meeting = down.copy()
        for i in range(size - 2, -1, -1):
            np.divide(squares[i], up[i + 1], out=step)
            meeting[i] -= step
            up[i] -= step
        np.abs(meeting, out=meeting)
        np.nan_to_num(meeting, copy=False, nan=np.inf)
        twist = torch.from_numpy(meeting).argmin(0).numpy()  # ten times faster than numpy's argmin
        vectors = meeting  # reused: allocating costs more than the arithmetic
        vectors.fill(0)
        vectors[twist, np.arange(len(values))] = 1
        rows = np.arange(size)[:, None]
        for pivots, beyond in ((down[:-1], rows[:-1] >= twist), (up[1:], rows[1:] <= twist)):
            np.divide(off_diagonal[:, None], pivots, out=pivots)
            pivots[beyond] = 0
        for i in range(size - 2, -1, -1):
            vectors[i] -= np.multiply(down[i], vectors[i + 1], out=step)
        for i in range(1, size):
            vectors[i] -= np.multiply(up[i], vectors[i - 1], out=step)
        vectors /= np.sqrt(np.einsum("ij,ij->j", vectors, vectors))
    return vectors
