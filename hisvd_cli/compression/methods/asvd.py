"""Activation-aware SVD (ASVD, Yuan et al. 2023): input channels scaled by their mean magnitude.

Minimises ``‖(W − W′)S‖_F`` with ``S = diag(E|x_j|^α)``. The truncated SVD of W S, taken back by
S⁻¹, is ``U_k U_kᵀ W`` with U_k the top eigenvectors of ``W S² Wᵀ``; so S is never inverted, and a
channel that is always zero counts for nothing instead of being divided by zero.
"""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import Metric
from hisvd_cli.linalg.statistics import Statistics, required
from hisvd_cli.linalg.truncation import truncate


@DECOMPOSERS.register("asvd", needs={"moments"})
def asvd(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    asvd_alpha: float,
    solver: Solver = "auto",
) -> tuple[Tensor, Tensor]:
    """Return U ``[m, rank]``, orthonormal, and V = Uᵀ W ``[rank, n]`` in float64.

    Args:
        weight: W ``[m, n]``.
        statistics: its channels.
        rank: at least 1 and at most ``min(m, n)``.
        asvd_alpha: exponent α of the scales, 0.5 in the paper; 0 is the plain SVD.
        solver: how eigenvectors are found, see :mod:`hisvd_cli.linalg.eigen`.

    Raises:
        SourceError: without channels.
    """
    return truncate(weight, asvd_metric(statistics, asvd_alpha), rank, solver)


def asvd_metric(statistics: Statistics, asvd_alpha: float) -> Metric:
    """Return the metric: inputs weighted by S². Raises SourceError without channels."""
    channels = required(statistics.channels, "asvd", "moments")
    # Relative to the mean, so that no power of small activations is lost to underflow.
    mean_abs = channels.mean_abs.double()
    relative = mean_abs / mean_abs.mean().clamp_min(1e-300)
    return Metric(right=relative ** (2 * asvd_alpha))
