"""A pair of factors written as some of the product's own rows, and what makes the others of them.

A pair U V of rank r has r² parameters too many: U A and A⁻¹ V are the same product for every
invertible A. Taking for A⁻¹ the inverse of r independent rows of U turns those rows into the
identity, which need not be stored. What is left are r rows of the product, V′ ``[r, n]``, the
coefficients C ``[m − r, r]`` that make the other rows of them, and the order of the rows: r(m+n−r)
parameters and m indices (pivoting factorization, Zhao et al. 2025, arXiv 2501.19090, section 3).
Nothing is lost but rounding, so the rows are chosen for small coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pivoted(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V′, C and the order of the rows, so that ``U V = cat(V′, C V′)[order]``.

    Partial pivoting (Gauss) chooses rows of U, so that triangular solves give C without inverting
    anything that may be singular.

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
    """Return which row stands where after LAPACK's swaps, which count from 1."""
    order = list(range(rows))
    for i, other in enumerate(swaps.tolist()):
        order[i], order[other - 1] = order[other - 1], order[i]
    return torch.tensor(order)
