"""K-FAC metric of the loss (Martens and Grosse 2015): inputs and outputs weighted.

Minimises ``tr(H Δ G Δᵀ)``, Δ = W − W′, with H = E[g gᵀ] of the output gradients and G of the
inputs, over tokens, each shrunk towards its mean diagonal. With H = L Lᵀ, the matrix to truncate is
``Lᵀ W G^½``: ``U = L⁻ᵀ Q_k``, ``V = Q_kᵀ Lᵀ W``, Q_k the top eigenvectors of ``Lᵀ W G Wᵀ L``. Cost:
a Cholesky decomposition of H and one eigendecomposition ``[p, p]``, p = min(m, n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.compression.methods import register_metric
from hisvd_cli.linalg.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.linalg.metric import Metric


@register_metric("fisher", needs={"moments", "gradients"})
def kfac_metric(
    statistics: Statistics, *, input_shrinkage: float, output_shrinkage: float, weight: Tensor
) -> Metric:
    """Return the K-FAC metric.

    Args:
        statistics: the moment and the gradient; also the channel means if the moment is that of
            the outputs. With a zero gradient this is ``whitened`` with G shrunk.
        input_shrinkage: s of ``(1 − s)·G + s·mean(diag G)·I``, from 0 to 1.
        output_shrinkage: s of H, likewise; a singular H is damped by 1e-12 of its mean diagonal.
        weight: W ``[m, n]``.

    Raises:
        SourceError: the moment or the gradient is missing.
        NumericalError: the gradient is not finite, or not positive semidefinite.
    """
    from hisvd_cli.linalg.metric import fisher_metric

    return fisher_metric(weight, statistics, input_shrinkage, output_shrinkage)
