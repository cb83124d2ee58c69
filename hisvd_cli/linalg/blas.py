"""Matrix products through SciPy's BLAS, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_KINDS = (torch.float32, torch.float64)


def serves(matrix: Tensor) -> bool:
    """Return whether BLAS supports a matrix: on the CPU, float32 or float64, and not empty."""
    return matrix.device.type == "cpu" and matrix.dtype in _KINDS and matrix.numel() > 0


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``A B`` ``[m, k]`` for A ``[m, n]`` and B ``[n, k]``, both row-major.

    Faster than torch's MKL on processors of other vendors (11008 × 4096 × 1792 in float32 on two
    cores: 0.9 s instead of 1.2 s).
    """
    from scipy.linalg import get_blas_funcs

    columns, rows = right.contiguous().numpy().T, left.contiguous().numpy().T
    (gemm,) = get_blas_funcs(("gemm",), (columns,))
    return torch.from_numpy(gemm(1.0, columns, rows).T)


def lower_gram(rows: Tensor) -> Tensor:
    """Return ``X Xᵀ`` ``[r, r]`` for X ``[r, n]``; the part above the diagonal is undefined.

    ``syrk`` computes only one triangle (4096 rows of 11008 columns in float32 on two cores: 1.0 s,
    compared with 1.4 s for products of strips).
    """
    from scipy.linalg import get_blas_funcs

    # BLAS is column-major: a row-major matrix is passed as its transpose, without a copy.
    by_columns = rows.T.is_contiguous()
    plain = rows.T.numpy().T if by_columns else rows.contiguous().numpy().T
    (syrk,) = get_blas_funcs(("syrk",), (plain,))
    made = syrk(1.0, plain, trans=0 if by_columns else 1, lower=0)
    return torch.from_numpy(made.T)
