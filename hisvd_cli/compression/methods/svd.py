"""Plain truncated SVD of the weight (Eckart and Young 1936); needs no calibration.

Minimises ``‖W − W′‖_F``. As all metrics, it costs one eigendecomposition ``[p, p]``,
p = min(m, n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.compression.methods import register_metric

if TYPE_CHECKING:
    from hisvd_cli.linalg.metric import Metric
    from hisvd_cli.linalg.statistics import Statistics


@register_metric("svd")
def svd_metric(_statistics: Statistics) -> Metric:
    """Return the metric that weights all entries alike."""
    from hisvd_cli.linalg.metric import Metric

    return Metric()
