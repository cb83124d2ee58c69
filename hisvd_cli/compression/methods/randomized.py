"""Randomized range finder for any of the other metrics (the idea of RSVD-LLM).

Randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.3) on the Gram
matrix ``K = A Aᵀ`` of the weighted weight A: Q spans ``K^(q+1) Ω``, Ω Gaussian
``[p, rank + oversamples]``, and the eigenvectors are those of ``Qᵀ K Q``. A product with K is half
an iteration more than algorithm 4.4 applies to A.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hisvd_cli.compression.methods import DECOMPOSERS, MANY, Options
from hisvd_cli.compression.methods.asvd import AsvdOptions, asvd_metric
from hisvd_cli.compression.methods.fisher import kfac_metric
from hisvd_cli.compression.methods.fwsvd import fwsvd_metric
from hisvd_cli.compression.methods.gfwsvd import gfwsvd_metric
from hisvd_cli.compression.methods.svd import svd_metric
from hisvd_cli.compression.methods.whitened import whitened_metric
from hisvd_cli.linalg.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from hisvd_cli.linalg.metric import Metric


class RandomizedOptions(Options):
    """Options of ``randomized``."""

    weighting: Literal["svd", "asvd", "whitened", "fwsvd", "gfwsvd", "fisher"] = Field(
        "whitened",
        description="weighting to use: svd, asvd, whitened, fwsvd, gfwsvd or fisher.",
    )
    oversamples: int = Field(10, description="oversampling beyond the rank.", ge=0, le=MANY)
    power_iterations: int = Field(2, description="number of power iterations.", ge=0, le=1000)


def _needs(options: RandomizedOptions) -> frozenset[str]:
    return DECOMPOSERS.needs(options.weighting)


@DECOMPOSERS.register("randomized", needs=_needs, options=RandomizedOptions)
def randomized(
    weight: Tensor,
    statistics: Statistics,
    rank: int,
    *,
    options: RandomizedOptions,
    seed: int,
    asvd_alpha: float,
    input_shrinkage: float,
    output_shrinkage: float,
) -> tuple[Tensor, Tensor]:
    """Return U ``[m, rank]``, its columns of unit norm, and V ``[rank, n]`` in float64.

    Exact if ``rank + oversamples`` reaches ``min(m, n)``. Components are sorted, but another rank
    draws other random vectors.

    Args:
        weight: W ``[m, n]``.
        statistics: those that the weighting needs.
        rank: at least 1 and at most ``min(m, n)``.
        options: see :class:`RandomizedOptions`.
        seed: of the random vectors, drawn on the CPU so that all devices use the same.
        asvd_alpha: see ``asvd``.
        input_shrinkage: see ``fisher``.
        output_shrinkage: see ``fisher``.

    Raises:
        SourceError, NumericalError: as the method of the weighting.
    """
    from hisvd_cli.linalg.truncation import truncate

    metrics: dict[str, Callable[..., Metric]] = {
        "svd": svd_metric,
        "asvd": partial(asvd_metric, options=AsvdOptions(asvd_alpha=asvd_alpha)),
        "whitened": whitened_metric,
        "fwsvd": fwsvd_metric,
        "gfwsvd": gfwsvd_metric,
        "fisher": partial(
            kfac_metric,
            weight=weight,
            input_shrinkage=input_shrinkage,
            output_shrinkage=output_shrinkage,
        ),
    }
    find = partial(
        _approximate_eigenvectors,
        extra=options.oversamples,
        power=options.power_iterations,
        seed=seed,
    )
    return truncate(weight, metrics[options.weighting](statistics), rank, eigenvectors=find)


def _approximate_eigenvectors(
    gram: Tensor, rank: int, *, extra: int, power: int, seed: int
) -> Tensor:
    """Return approximate top eigenvectors of ``gram`` ``[p, p]``, orthonormal ``[p, rank]``."""
    import torch

    from hisvd_cli.linalg.eigen import leading

    size = gram.shape[0]
    generator = torch.Generator().manual_seed(seed)
    shape = (size, min(rank + extra, size))
    basis = torch.randn(shape, generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(power + 1):
        # Orthonormalise after each product: repeated products lose small components to rounding.
        basis = torch.linalg.qr(gram @ basis).Q
    return basis @ leading(basis.T @ gram @ basis, rank, "eigh")[1]
