"""Generalised Fisher-weighted SVD (GFWSVD, Chekalina et al. 2025): a Kronecker-factored Fisher.

Minimises ``tr(E[D Dᵀ] Δ E[Dᵀ D] Δᵀ)``: the Fisher information of W, from whole-sequence gradients
D, is approximated by the Kronecker product of ``E[D Dᵀ]`` (outputs) and ``E[Dᵀ D]`` (inputs). The
paper finds the nearest Kronecker product by power iteration over all stored gradients; these two
factors are its first step from the identity, and need only sums over sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hisvd_cli.compression.methods import register_metric
from hisvd_cli.linalg.statistics import Statistics, required

if TYPE_CHECKING:
    from hisvd_cli.linalg.metric import Metric

DAMPING = 1e-6
"""Damping of the output factor, relative to the mean of its diagonal; the authors' code starts with
1e-6 of each diagonal entry. The input factor is not inverted and needs none."""


@register_metric("gfwsvd", needs={"weight-gradients"})
def gfwsvd_metric(statistics: Statistics) -> Metric:
    """Return the metric that weights both sides; the plain SVD if all gradients are zero.

    Raises:
        SourceError: the weight gradients are missing.
        NumericalError: the weight gradients are not finite.
    """
    from hisvd_cli.linalg.metric import Metric, triangular_root
    from hisvd_cli.linalg.moments import Moment

    gradients = required(statistics.weight_gradients, "gfwsvd", "weight-gradients")
    left = triangular_root(gradients.output.double(), DAMPING)
    return Metric(left, Moment(gradients.input, "input")) if left is not None else Metric()
