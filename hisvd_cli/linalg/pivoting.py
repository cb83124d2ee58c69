"""Pivoting factorization: r rows of the product, and coefficients of the other rows.

Factors U V of rank r have r² redundant parameters, because (U A)(A⁻¹ V) is the same product for
every invertible A. With A the inverse of r independent rows of U, those rows become the identity,
which need not be stored. What remains are r rows of the product, V′ ``[r, n]``, the coefficients
C ``[m − r, r]`` of the other rows, and the order of the rows: r(m+n−r) parameters and m indices
(Zhao et al. 2025, arXiv 2501.19090, section 3). The only loss is rounding, so rows are chosen that
give small coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pivoted(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V′, C and the order of the rows, so that ``U V = cat(V′, C V′)[order]``.

    Rows of U are chosen by partial pivoting, so that C follows from triangular solves without
    inverting a possibly singular matrix.

    Args:
        u: U ``[m, r]``, r < m.
        v: V ``[r, n]``.

    Returns:
        V′ ``[r, n]``, C ``[m − r, r]`` in the dtype and on the device of U, and the order ``[m]``
        (int32): row i of the product is row ``order[i]`` of V′ above C V′.
    """
    rank = u.shape[1]
    compact, swaps, _ = torch.linalg.lu_factor_ex(u)
    rows = _permutation(swaps, len(u)).to(u.device)
    lower = compact[:rank].tril(-1)
    coefficients = torch.linalg.solve_triangular(
        lower, compact[rank:], upper=False, left=False, unitriangular=True
    )
    order = torch.empty(len(u), dtype=torch.int32, device=u.device)
    order[rows] = torch.arange(len(u), dtype=torch.int32, device=u.device)
    return u[rows[:rank]] @ v, coefficients, order


def _permutation(swaps: Tensor, rows: int) -> Tensor:
    """Return the row order after LAPACK's swaps, which are 1-based."""
    order = list(range(rows))
    for i, other in enumerate(swaps.tolist()):
        order[i], order[other - 1] = order[other - 1], order[i]
    return torch.tensor(order)
