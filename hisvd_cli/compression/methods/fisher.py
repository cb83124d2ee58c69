"""Both sides weighted: the K-FAC metric of the loss (Martens and Grosse 2015), token by token.

Minimises ``tr(H Δ G Δᵀ)``, Δ = W − W′, with H = E[g gᵀ] of the gradient at the output and G of the
input, each shrunk towards its mean diagonal. With H = L Lᵀ the matrix to truncate is ``Lᵀ W G^½``:
``U = L⁻ᵀ Q_k``, ``V = Q_kᵀ Lᵀ W``, Q_k the top eigenvectors of ``Lᵀ W G Wᵀ L``. Cost: a Cholesky
factor of H and one eigendecomposition ``[p, p]``, p = min(m, n).
"""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import fisher_metric
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.linalg.truncation import truncate


@DECOMPOSERS.register("fisher", needs={"moments", "gradients"})
def fisher(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    input_shrinkage: float,
    output_shrinkage: float,
    solver: Solver = "auto",
) -> tuple[Tensor, Tensor]:
    """Return U ``[m, rank]``, its columns of unit norm, and V ``[rank, n]`` in float64.

    Args:
        weight: W ``[m, n]``.
        statistics: its moment and gradient, and its channels where the moment is that of the
            output. A zero gradient makes this ``whitened`` (with G shrunk).
        rank: at least 1 and at most ``min(m, n)``.
        input_shrinkage: s of ``(1 − s)·G + s·mean(diag G)·I``, from 0 to 1.
        output_shrinkage: s of H, likewise; a singular H is damped by 1e-12 of its mean diagonal.
        solver: how eigenvectors are found, see :mod:`hisvd_cli.linalg.eigen`.

    Raises:
        SourceError: without a moment or a gradient.
        NumericalError: a gradient that is not finite, or not positive semidefinite.
    """
    metric = fisher_metric(weight, statistics, input_shrinkage, output_shrinkage)
    return truncate(weight, metric, rank, solver)
