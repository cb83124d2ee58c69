"""Plain truncated SVD of the weight (Eckart and Young 1936); it needs no calibration.

Minimises ``‖W − W′‖_F``. Cost: one eigendecomposition ``[p, p]``, p = min(m, n), as all of these.
"""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import Metric
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.linalg.truncation import truncate


@DECOMPOSERS.register("svd")
def svd(
    weight: Tensor,
    statistics: Statistics,  # noqa: ARG001
    rank: int,
    *,
    solver: Solver = "auto",
) -> tuple[Tensor, Tensor]:
    """Return U ``[m, rank]``, orthonormal, and V = Uᵀ W ``[rank, n]`` in float64.

    Args:
        weight: W ``[m, n]``.
        statistics: not looked at.
        rank: at least 1 and at most ``min(m, n)``.
        solver: how eigenvectors are found, see :mod:`hisvd_cli.linalg.eigen`.
    """
    return truncate(weight, Metric(), rank, solver)
