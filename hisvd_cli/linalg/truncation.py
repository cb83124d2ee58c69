"""The best low-rank answer in a metric, and what each of its components is worth.

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
    """Have numerical failures of the body name the sublayer. Raises NumericalError."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{sublayer}: {error.message}", error.hint) from error
    except LinAlgError as error:
        raise NumericalError(
            f"{sublayer}: its decomposition did not converge; its statistics may not be finite.",
            "Check them with 'hisvd inspect', and calibrate again.",
        ) from error


def truncate(
    weight: Tensor,
    metric: Metric,
    rank: int,
    solver: Solver = "auto",
    eigenvectors: Eigenvectors | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the factors of the best replacement of W of rank k in a metric.

    The columns of U have unit norm, whatever the scale of the metric: gradients are tiny, and both
    factors are to survive half precision. The first j components of a larger rank are the answer
    of rank j, where ``eigenvectors`` are nested, as the exact ones are.

    Args:
        weight: W ``[m, n]``.
        metric: what is minimised.
        rank: k, at least 1 and at most ``min(m, n)``.
        solver: finds the eigenvectors, in float32 where the matrix is large and the result is the
            same; ``svd`` finds them as singular vectors in float64.
        eigenvectors: finds them in its place.

    Returns:
        U ``[m, k]`` and V ``[k, n]``, both in float64, or in float32 where that did; best component
        first. Without a left side U is orthonormal.

    Raises:
        LinAlgError: non-finite numbers.
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
    """Return the left singular vectors ``[m, rank]`` of A, whose squares were never added up."""
    top: Tensor = torch.linalg.svd(metric.whitened(weighted), full_matrices=False).U[:, :rank]
    return top.contiguous()


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product with columns of U of unit norm; a zero column stays one."""
    norms = u.norm(dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    return u / norms, v * norms[:, None]


def energies(weight: Tensor, metric: Metric) -> Tensor:
    """Return what each component of W adds to the loss when it is dropped ``[min(m, n)]``.

    Falling, in float64 on the CPU: ``Σ_{j>k}`` is the loss of :func:`truncate` at rank k.
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
