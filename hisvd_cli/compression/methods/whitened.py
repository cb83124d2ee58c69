"""Activation-whitened truncation (the objective of SVD-LLM, Wang et al. 2025).

The best rank-k W′ under ``‖(W − W′)G^½‖_F`` is ``U_k U_kᵀ W``, with U_k the top eigenvectors of
``M = W G Wᵀ``. Nothing is inverted, so a singular G needs no special case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.compression.methods import register_metric
from hisvd_cli.linalg.statistics import Statistics, required

if TYPE_CHECKING:
    from hisvd_cli.linalg.metric import Metric


@register_metric("whitened", needs={"moments"})
def whitened_metric(statistics: Statistics) -> Metric:
    """Return the metric that weights inputs by G. Raises SourceError if the moment is missing."""
    from hisvd_cli.linalg.metric import Metric

    return Metric(right=required(statistics.moment, "whitened", "moments"))
