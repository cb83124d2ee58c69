"""The best low-rank approximation in a metric, and the loss of each component.

Legend: as in :mod:`hisvd_cli.linalg.metric`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # missing from its __all__

from hisvd_cli.linalg.eigen import Solver, leading
from hisvd_cli.linalg.metric import Metric
from hisvd_cli.linalg.precision import energies_in, truncate_in
from hisvd_cli.utils.errors import NumericalError

_PRECISIONS = (torch.float32, torch.float64)
Eigenvectors = Callable[[Tensor, int], Tensor]
"""``(gram [p, p], rank) -> [p, rank]``, orthonormal, the largest first."""


@contextmanager
def decomposing(sublayer: str) -> Iterator[None]:
    """Add the sublayer's name to numerical errors of the body. Raises NumericalError."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{sublayer}: {error.message}", error.hint) from error
    except LinAlgError as error:
        raise NumericalError(
            f"{sublayer}: the decomposition did not converge; the statistics may not be finite.",
            "Check the calibration with 'hisvd inspect', or calibrate again.",
        ) from error


def truncate(
    weight: Tensor,
    metric: Metric,
    rank: int,
    solver: Solver = "auto",
    eigenvectors: Eigenvectors | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of W of rank k in a metric.

    The columns of U have unit norm whatever the scale of the metric, because gradients are tiny
    and both factors must be representable in half precision. If the eigenvectors are nested, as
    exact ones are, the first j components are the best approximation of rank j.

    Args:
        weight: W ``[m, n]``.
        metric: the error to minimize.
        rank: k, at least 1 and at most ``min(m, n)``.
        solver: computes the eigenvectors, in float32 if the matrix is large and the result is the
            same; ``svd`` computes singular vectors in float64.
        eigenvectors: function that replaces the solver.

    Returns:
        U ``[m, k]`` and V ``[k, n]`` in float64, or in float32 if that was sufficient; best
        component first. Without a left side of the metric, U is orthonormal.

    Raises:
        LinAlgError: values are not finite.
    """
    if metric.transposed:
        plain = replace(metric, transposed=False)
        v, u = truncate(weight.T, plain, rank, solver, eigenvectors)
        return _balanced(u.T, v.T)
    if eigenvectors is None and solver != "svd":
        for dtype in _PRECISIONS:
            if found := truncate_in(dtype, weight, metric, rank, solver):
                return found if metric.left is None else _balanced(*found)
        eigenvectors = partial(_top, solver=solver)
    weighted = metric.weigh(weight.double())  # Lᵀ W
    if eigenvectors is None:
        top = _singular_vectors(metric, weighted, rank)
    elif metric.narrows(weight):
        # Lᵀ W = Q₀ R: A Aᵀ = Q₀ (R G Rᵀ) Q₀ᵀ, and the bracket is [n, n].
        basis, inner = torch.linalg.qr(weighted)
        top = basis @ eigenvectors(metric.gram(inner), rank)
    else:
        top = eigenvectors(metric.gram(weighted), rank)
    return _balanced(metric.unweigh(top), top.T @ weighted)


def _top(gram: Tensor, rank: int, solver: Solver) -> Tensor:
    return leading(gram, rank, solver)[1]


def _singular_vectors(metric: Metric, weighted: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors ``[m, rank]`` of A, computed without forming A Aᵀ."""
    top: Tensor = torch.linalg.svd(metric.whitened(weighted), full_matrices=False).U[:, :rank]
    return top.contiguous()


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the columns of U to unit norm, keeping the product; zero columns stay zero."""
    norms = u.norm(dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    return u / norms, v * norms[:, None]


def energies(weight: Tensor, metric: Metric) -> Tensor:
    """Return the loss of dropping each component of W, ``[min(m, n)]``.

    In descending order, in float64 on the CPU: ``Σ_{j>k}`` is the loss of :func:`truncate` at
    rank k.
    """
    if metric.transposed:
        return energies(weight.T, replace(metric, transposed=False))
    for dtype in _PRECISIONS:
        found = energies_in(dtype, weight, metric)
        if found is not None:
            return found.clamp_min(0).cpu()
    weighted = metric.weigh(weight.double())
    if metric.narrows(weight):
        weighted = torch.linalg.qr(weighted, mode="r").R
    values = torch.linalg.eigvalsh(metric.gram(weighted))
    energy: Tensor = values.flip(0)[: min(weight.shape)].clamp_min(0).cpu()
    return energy
