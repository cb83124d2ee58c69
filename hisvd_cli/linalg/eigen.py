"""Leading eigenvectors of a symmetric matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hisvd_cli.linalg.subspace import leading_subspace
from hisvd_cli.linalg.tridiagonal import leading_part

Solver = Literal["auto", "eigh", "svd", "partial", "subspace"]
"""How eigenvectors are computed: all (eigh), as singular vectors of a root (svd), only those that
are kept (partial), or approximately (subspace)."""

_LEAST_PART = 2048
"""For smaller matrices, computing all eigenvectors takes no longer than computing a part."""
_WHOLE = 0.7
"""Share of wanted eigenvectors from which all are computed (4096 × 4096 in float32 on two cores:
5.5 s for all, 2.6 s for a fifth and 5.1 s for 0.7 of them)."""


def leading(gram: Tensor, rank: int, solver: Solver = "auto") -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues ``[rank]`` and their eigenvectors ``[p, rank]``, descending.

    Falls back to ``eigh`` if ``partial`` or ``subspace`` is not accurate enough.

    Args:
        gram: symmetric, positive semidefinite ``[p, p]``.
        rank: at least 1 and at most p.
        solver: ``auto`` selects by size, rank and device; ``svd`` means ``eigh`` here.

    Raises:
        LinAlgError: the eigendecomposition did not converge.
    """
    found = None
    if solver == "subspace":
        found = leading_subspace(gram, rank)
    elif gram.device.type == "cpu" and (solver == "partial" or _is_partial(gram, rank, solver)):
        found = leading_part(gram, rank)
    if found is not None:
        return found
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank].contiguous()


def _is_partial(gram: Tensor, rank: int, solver: Solver) -> bool:
    """Return whether ``auto`` computes only the eigenvectors that are kept."""
    return solver == "auto" and len(gram) >= _LEAST_PART and rank < _WHOLE * len(gram)
