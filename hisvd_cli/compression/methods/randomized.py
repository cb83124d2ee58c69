"""Any of the other metrics with a randomized range finder in place of the eigendecomposition.

RSVD-LLM's idea, by randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4
and 5.3) on the Gram matrix ``K = A Aᵀ`` of the weighted weight A: Q spans ``K^(q+1) Ω``, Ω Gaussian
``[p, rank + oversamples]``, and the answer is the eigenvectors of ``Qᵀ K Q``. One product with K
counts as half an iteration more than algorithm 4.4 makes on A.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.compression.methods.asvd import asvd_metric
from hisvd_cli.compression.methods.fwsvd import fwsvd_metric
from hisvd_cli.compression.methods.gfwsvd import gfwsvd_metric
from hisvd_cli.compression.methods.whitened import whitened_metric
from hisvd_cli.linalg.eigen import leading
from hisvd_cli.linalg.metric import Metric, fisher_metric
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.linalg.truncation import truncate
from hisvd_cli.utils.errors import UsageError, suggest


@DECOMPOSERS.register("randomized")
def randomized(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    weighting: str,
    oversamples: int,
    power_iterations: int,
    seed: int,
    asvd_alpha: float,
    input_shrinkage: float,
    output_shrinkage: float,
) -> tuple[Tensor, Tensor]:
    """Return U ``[m, rank]``, its columns of unit norm, and V ``[rank, n]`` in float64.

    Exact where ``rank + oversamples`` reaches ``min(m, n)``. Components are sorted, but those of
    another rank are another draw.

    Args:
        weight: W ``[m, n]``.
        statistics: whatever ``weighting`` needs.
        rank: at least 1 and at most ``min(m, n)``.
        weighting: whose metric: svd, asvd, whitened, fwsvd, gfwsvd or fisher.
        oversamples: random vectors beyond the rank.
        power_iterations: q; more of them separate components of nearly equal energy.
        seed: of the random vectors; they are drawn on the CPU, so all devices draw the same.
        asvd_alpha: see ``asvd``.
        input_shrinkage: see ``fisher``.
        output_shrinkage: see ``fisher``.

    Raises:
        UsageError: an unknown weighting.
        SourceError, NumericalError: as the method whose metric it is.
    """
    metrics: dict[str, Callable[[], Metric]] = {
        "svd": Metric,
        "asvd": partial(asvd_metric, statistics, asvd_alpha),
        "whitened": partial(whitened_metric, statistics),
        "fwsvd": partial(fwsvd_metric, statistics),
        "gfwsvd": partial(gfwsvd_metric, statistics),
        "fisher": partial(fisher_metric, weight, statistics, input_shrinkage, output_shrinkage),
    }
    if weighting not in metrics:
        raise UsageError(f"No weighting '{weighting}'.", suggest(weighting, metrics))
    find = partial(_approximate_eigenvectors, extra=oversamples, power=power_iterations, seed=seed)
    return truncate(weight, metrics[weighting](), rank, eigenvectors=find)


def _approximate_eigenvectors(
    gram: Tensor, rank: int, *, extra: int, power: int, seed: int
) -> Tensor:
    """Return orthonormal ``[p, rank]``, nearly the top eigenvectors of ``gram`` ``[p, p]``."""
    size = gram.shape[0]
    generator = torch.Generator().manual_seed(seed)
    shape = (size, min(rank + extra, size))
    basis = torch.randn(shape, generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(power + 1):
        # Orthonormal after each product: a plain power loses the small components to rounding.
        basis = torch.linalg.qr(gram @ basis).Q
    return basis @ leading(basis.T @ gram @ basis, rank, "eigh")[1]
