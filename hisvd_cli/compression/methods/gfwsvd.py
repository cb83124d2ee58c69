"""Generalised Fisher-weighted SVD (GFWSVD, Chekalina et al. 2025): a Kronecker-factored Fisher.

The Fisher information of W from whole-sequence gradients D is taken as a Kronecker product of
``E[D Dᵀ]`` (outputs) and ``E[Dᵀ D]`` (inputs), and ``tr(E[D Dᵀ] Δ E[Dᵀ D] Δᵀ)`` is minimised. The
paper takes the Kronecker product nearest to the Fisher matrix, by power iteration over all stored
gradients; these two factors are the first step of that iteration from the identity, and sums over
sequences are enough for them.
"""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import Metric, triangular_root
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Statistics, required
from hisvd_cli.linalg.truncation import truncate

DAMPING = 1e-6
"""Of the outputs' factor, relative to the mean of its diagonal; the authors' code begins with 1e-6
of each diagonal entry. The inputs' factor is not inverted, and needs none."""


@DECOMPOSERS.register("gfwsvd", needs={"weight-gradients"})
def gfwsvd(
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
    return truncate(weight, gfwsvd_metric(statistics), rank, solver)


def gfwsvd_metric(statistics: Statistics) -> Metric:
    """Return the metric: both sides weighted. Raises as :func:`gfwsvd`."""
    gradients = required(statistics.weight_gradients, "gfwsvd", "weight-gradients")
    left = triangular_root(gradients.output.double(), DAMPING)
    # Without gradients there is no metric: all weights count alike, as in the plain SVD.
    return Metric(left, Moment(gradients.input, "input")) if left is not None else Metric()
