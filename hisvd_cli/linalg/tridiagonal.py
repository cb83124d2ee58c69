"""Some eigenvectors of a large symmetric matrix on a CPU, by way of a tridiagonal one.

LAPACK reduces the matrix to a tridiagonal T and finds its eigenvalues; the eigenvectors wanted are
then those of T, each from a twisted factorization of ``T − λI`` (Dhillon and Parlett 2004), turned
back by the reflections of the reduction. Drivers that find vectors by index orthogonalize them one
by one, and take longer than all vectors do from a third of them on.

Eigenvalues nearer to each other than rounding can tell apart would give the same vector twice; that
is looked at, and nothing returned where it happened.

Legend: A ``[p, p]`` = Q T Qᵀ, k vectors wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hisvd_cli.utils.prefetch import ahead

_ARRAY_BYTES = 30 << 20
"""Of an array of the vectors that are made at a time: many, as a call of numpy for each row of T is
most of what they cost, but less than what malloc takes from the system anew each time."""
_MIXTURES = 8
_SKEW = 1e-3
"""How far a random combination of the vectors may be from one of orthonormal ones: rounding of
float32 leaves some 1e-5, a vector that stands twice some 1."""


def leading_part(gram: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the largest eigenvalues ``[k]`` and their eigenvectors ``[p, k]``, falling.

    Args:
        gram: A ``[p, p]``, symmetric, in float32 or float64 on a CPU.
        rank: k, at least 1 and at most p.

    Returns:
        In the dtype of A; None where some vectors cannot be told apart, or A is not finite.
    """
    from scipy.linalg import LinAlgError, eigvalsh_tridiagonal, get_lapack_funcs

    size = len(gram)
    (reduce,) = get_lapack_funcs(("sytrd",), (gram.numpy(),))
    # LAPACK counts by columns: the transpose, which is the same matrix, is read without a copy.
    packed, diagonal, beside, scales, failed = reduce(gram.numpy().T, lower=1, lwork=64 * size)
    if failed:
        return None
    diagonal, beside = diagonal.astype("float64"), beside.astype("float64")
    try:
        values = eigvalsh_tridiagonal(diagonal, beside, lapack_driver="sterf")[::-1][:rank]
    except (LinAlgError, ValueError):  # no convergence, or numbers that are not finite
        return None
    vectors, together = gram.new_empty(size, rank), max(1, _ARRAY_BYTES // (8 * size))
    reflections = torch.from_numpy(packed)[1:, :-1], torch.from_numpy(scales)

    def twisted(span: slice) -> Tensor:
        return torch.from_numpy(_twisted_vectors(diagonal, beside, values[span])).to(gram.dtype)

    spans = [slice(start, start + together) for start in range(0, rank, together)]
    for span, inner in ahead(twisted, spans):
        # The first reflection leaves the first row as it is.
        vectors[0, span] = inner[0]
        vectors[1:, span] = torch.ormqr(*reflections, inner[1:])
    # A vector that stands twice shows in every combination of them.
    mixtures = torch.randn(rank, _MIXTURES, generator=torch.Generator().manual_seed(0))
    mixtures = mixtures.to(gram.dtype)
    skew = float((vectors.T @ (vectors @ mixtures) - mixtures).abs().max())
    if not skew < _SKEW:
        return None
    return torch.from_numpy(values.copy()).to(gram.dtype), vectors


def _twisted_vectors(diagonal: Any, beside: Any, values: Any) -> Any:
    """Return unit eigenvectors of T, one a column, for its eigenvalues.

    For each λ, ``T − λI`` is factored from both ends, D⁺ downward and D⁻ upward; where they meet
    with the smallest pivot γ = D⁺ + D⁻ − (T − λI), the vector has a large entry, and from there it
    follows outward by one product each. Its residual is γ, so λ need not be improved.

    Args:
        diagonal: of T ``[p]``, numpy float64, as all here.
        beside: T's entries beside the diagonal ``[p − 1]``.
        values: λ ``[k]``.
    """
    import numpy as np

    size, squares, step = len(diagonal), beside**2, np.empty(len(values))
    down = diagonal[:, None] - values
    up = down.copy()
    # A pivot of zero makes the next infinite, and the one after it what it would be without it.
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
        twist = torch.from_numpy(meeting).argmin(0).numpy()  # numpy's takes ten times as long
        vectors = meeting  # used again: new memory costs more than the arithmetic
        vectors.fill(0)
        vectors[twist, np.arange(len(values))] = 1
        rows = np.arange(size)[:, None]
        for pivots, beyond in ((down[:-1], rows[:-1] >= twist), (up[1:], rows[1:] <= twist)):
            np.divide(beside[:, None], pivots, out=pivots)
            pivots[beyond] = 0
        for i in range(size - 2, -1, -1):
            vectors[i] -= np.multiply(down[i], vectors[i + 1], out=step)
        for i in range(1, size):
            vectors[i] -= np.multiply(up[i], vectors[i - 1], out=step)
        vectors /= np.sqrt(np.einsum("ij,ij->j", vectors, vectors))
    return vectors
