"""Products by BLAS itself, where torch has no name for them; on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_KINDS = (torch.float32, torch.float64)


def serves(matrix: Tensor) -> bool:
    """Tell whether a matrix can be given to BLAS: in the memory of a CPU, and not empty."""
    return matrix.device.type == "cpu" and matrix.dtype in _KINDS and matrix.numel() > 0


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``A B`` ``[m, k]`` for A ``[m, n]`` and B ``[n, k]``, both row by row.

    Torch's own library is held back on processors that its maker does not sell (11008 × 4096 × 1792
    in float32, two cores of another: 1.2 s, here 0.9 s).
    """
    from scipy.linalg import get_blas_funcs

    columns, rows = right.contiguous().numpy().T, left.contiguous().numpy().T
    (gemm,) = get_blas_funcs(("gemm",), (columns,))
    return torch.from_numpy(gemm(1.0, columns, rows).T)


def lower_gram(rows: Tensor) -> Tensor:
    """Return the lower triangle of ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``, any numbers above it.

    ``syrk`` multiplies out no more than that (11008 columns of 4096 rows in float32, two cores:
    1.0 s, where products of strips took 1.4 s).
    """
    from scipy.linalg import get_blas_funcs

    # BLAS counts by columns: a row-major matrix is read as its transpose, without a copy.
    by_columns = rows.T.is_contiguous()
    plain = rows.T.numpy().T if by_columns else rows.contiguous().numpy().T
    (syrk,) = get_blas_funcs(("syrk",), (plain,))
    made = syrk(1.0, plain, trans=0 if by_columns else 1, lower=0)
    return torch.from_numpy(made.T)
