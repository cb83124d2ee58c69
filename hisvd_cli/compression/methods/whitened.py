"""Activation-whitened truncation, without an inverse of anything.

The best rank-k W′ under ``‖(W − W′)G^½‖_F`` (SVD-LLM's objective) is ``U_k U_kᵀ W`` with U_k the
top eigenvectors of ``M = W G Wᵀ``. A singular G needs no special case.
"""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import Metric
from hisvd_cli.linalg.statistics import Statistics, required
from hisvd_cli.linalg.truncation import truncate


@DECOMPOSERS.register("whitened", needs={"moments"})
def whitened(
    weight: Tensor, statistics: Statistics, rank: int, *, solver: Solver = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the factors ``U = U_k`` and ``V = U_kᵀ W``.

    Args:
        weight: W ``[m, n]``.
        statistics: its moment, of the input or of the output.
        rank: k, at least 1 and at most ``min(m, n)``.
        solver: how eigenvectors are found, see :mod:`hisvd_cli.linalg.eigen`.

    Returns:
        U ``[m, k]`` with orthonormal columns, V ``[k, n]``, both in float64.

    Raises:
        SourceError: without a moment.
    """
    return truncate(weight, whitened_metric(statistics), rank, solver)


def whitened_metric(statistics: Statistics) -> Metric:
    """Return the metric: inputs weighted by G. Raises SourceError without a moment."""
    return Metric(right=required(statistics.moment, "whitened", "moments"))
