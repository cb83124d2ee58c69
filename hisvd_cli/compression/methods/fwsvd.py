"""Fisher-weighted SVD (FWSVD, Hsu et al. 2022): rows weighted by their Fisher information.

Minimises ``Σ_i f_i ‖W_i − W′_i‖²`` over the rows i, f_i the sum over the row of the mean squared
gradient ∂loss/∂W of whole sequences: ``f = diag E[D Dᵀ]``.
"""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import Metric, diagonal_root
from hisvd_cli.linalg.statistics import Statistics, required
from hisvd_cli.linalg.truncation import truncate


@DECOMPOSERS.register("fwsvd", needs={"weight-gradients"})
def fwsvd(
    weight: Tensor, statistics: Statistics, rank: int, *, solver: Solver = "auto"
) -> tuple[Tensor, Tensor]:
    """Return U ``[m, rank]``, its columns of unit norm, and V ``[rank, n]`` in float64.

    Args:
        weight: W ``[m, n]``.
        statistics: its weight gradients; where all are zero, this is the plain SVD.
        rank: at least 1 and at most ``min(m, n)``.
        solver: how eigenvectors are found, see :mod:`hisvd_cli.linalg.eigen`.

    Raises:
        SourceError: without weight gradients.
        NumericalError: weight gradients that are not finite.
    """
    return truncate(weight, fwsvd_metric(statistics), rank, solver)


def fwsvd_metric(statistics: Statistics) -> Metric:
    """Return the metric: outputs weighted by f. Raises as :func:`fwsvd`."""
    gradients = required(statistics.weight_gradients, "fwsvd", "weight-gradients")
    return Metric(left=diagonal_root(gradients.output.diagonal()))
