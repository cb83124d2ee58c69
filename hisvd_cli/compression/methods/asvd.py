"""Activation-aware SVD (ASVD, Yuan et al. 2023): input channels scaled by their mean magnitude.

Minimises ``‖(W − W′)S‖_F`` with ``S = diag(E|x_j|^α)``. The truncated SVD of W S times S⁻¹ is
``U_k U_kᵀ W``, with U_k the top eigenvectors of ``W S² Wᵀ``: S is not inverted, so channels that
are always zero need no special case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from hisvd_cli.compression.methods import Options, register_metric
from hisvd_cli.linalg.statistics import Statistics, required

if TYPE_CHECKING:
    from hisvd_cli.linalg.metric import Metric


class AsvdOptions(Options):
    """Options of ``asvd``."""

    asvd_alpha: float = Field(0.5, description="exponent of the mean absolute input.", ge=0, le=8)


@register_metric("asvd", needs={"moments"}, options=AsvdOptions)
def asvd_metric(statistics: Statistics, *, options: AsvdOptions) -> Metric:
    """Return the metric that weights inputs by S².

    Args:
        statistics: the means of the input channels.
        options: exponent α, 0.5 in the paper; 0 is the plain SVD.

    Raises:
        SourceError: the channel means are missing.
    """
    from hisvd_cli.linalg.metric import Metric

    channels = required(statistics.channels, "asvd", "moments")
    # Relative to the mean, so that powers of small activations do not underflow.
    mean_abs = channels.mean_abs.double()
    relative = mean_abs / mean_abs.mean().clamp_min(1e-300)
    return Metric(right=relative ** (2 * options.asvd_alpha))
