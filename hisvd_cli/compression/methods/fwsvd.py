"""Fisher-weighted SVD (FWSVD, Hsu et al. 2022): rows weighted by their Fisher information.

Minimises ``Σ_i f_i ‖W_i − W′_i‖²`` over the rows i. f_i is the mean squared gradient ∂loss/∂W of
whole sequences, summed over the row: ``f = diag E[D Dᵀ]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.compression.methods import register_metric
from hisvd_cli.linalg.statistics import Statistics, required

if TYPE_CHECKING:
    from hisvd_cli.linalg.metric import Metric


@register_metric("fwsvd", needs={"weight-gradients"})
def fwsvd_metric(statistics: Statistics) -> Metric:
    """Return the metric that weights outputs by f; the plain SVD if all gradients are zero.

    Raises:
        SourceError: the weight gradients are missing.
        NumericalError: the weight gradients are not finite.
    """
    from hisvd_cli.linalg.metric import Metric, diagonal_root

    gradients = required(statistics.weight_gradients, "fwsvd", "weight-gradients")
    return Metric(left=diagonal_root(gradients.output.diagonal()))
