"""Truncation of large matrices in the lowest precision that the result allows.

Float32 takes half the time on a CPU, and a fraction on most GPUs. Rounding changes each eigenvalue
of ``Lᵀ W G Wᵀ L`` by about ε times their sum, and the loss of a truncation by at most √p times
that. If the loss is large compared with this bound, the truncation is as good as the exact one.
If it is not, as for layers whose inputs have a few huge channels, the functions return None, and
float64 is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.linalg.blas import product, serves
from hisvd_cli.linalg.eigen import Solver, leading
from hisvd_cli.linalg.metric import Metric, triangular_root
from hisvd_cli.linalg.products import (
    congruence,
    filled,
    gram,
    lower_gram,
    orthonormal,
    triangular_congruence,
    triangular_product,
)

TOLERANCE = 3e-3
"""Maximum rounding bound relative to the optimal loss. The bound is loose: at a bound of 5e-3,
rounding added at most 1e-5 of the loss, and 5e-3 at a bound of 1.3e-2."""
LEAST_SIZE = 1024
"""Smaller matrices are always handled in float64."""
_PROBES = 64
_MOST_SPREAD = 1e2
"""Maximum ratio of the diagonal entries of a triangular matrix that is used for solving."""
_SKEW = 1e-3
_ALIGNED = 16
"""Products whose sizes are multiples of this take two thirds of the time (4096 × 11008 × 1790 in
float32 on a CPU: 1.28 s; × 1792: 0.86 s), so a few extra components are computed and dropped."""

_FAST_DOUBLES = {(8, 0), (9, 0), (10, 0)}  # compute capabilities


def truncate_in(
    dtype: torch.dtype, weight: Tensor, metric: Metric, rank: int, solver: Solver = "auto"
) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the best approximation of W of rank k, computed in ``dtype``.

    Args:
        dtype: float32 or float64.
        weight: W ``[m, n]``.
        metric: the error to minimize; not transposed.
        rank: k.
        solver: computes the eigenvectors.

    Returns:
        U ``[m, k]`` and V ``[k, n]`` in ``dtype``; None if the precision may not be sufficient, or
        if W is small.

    Raises:
        LinAlgError: the eigenvectors did not converge.
    """
    if rank >= min(weight.shape):
        return None
    problem = _pose(dtype, weight, metric)
    # Checked before computing eigenvectors: an upper bound of the truncation loss.
    if problem is None or _most_loss(problem.gram, rank) < problem.least_loss:
        return None
    size = len(problem.gram)
    values, vectors = leading(problem.gram, min(-(-rank // _ALIGNED) * _ALIGNED, size), solver)
    loss = float(problem.gram.diagonal().double().sum()) - float(values[:rank].double().sum())
    if loss < problem.least_loss or float(values[-1]) <= 0:
        return None
    factors = problem.factors(values, vectors)
    return None if factors is None else (factors[0][:, :rank], factors[1][:rank])


def energies_in(dtype: torch.dtype, weight: Tensor, metric: Metric) -> Tensor | None:
    """Return the eigenvalues ``[min(m, n)]`` of the problem of :func:`truncate_in`, in descending
    order and in float64; None if the smaller half may be dominated by rounding.

    Args:
        dtype: precision of the computation, float32 or float64.
        weight: W ``[m, n]``.
        metric: not transposed.

    Raises:
        LinAlgError: the eigenvalues did not converge.
    """
    problem = _pose(dtype, weight, metric)
    if problem is None:
        return None
    values = torch.linalg.eigvalsh(problem.gram).flip(0).double()
    return values if float(values[len(values) // 2 :].sum()) >= problem.least_loss else None


@dataclass(frozen=True)
class _Wide:
    """The eigenproblem of ``gram = Lᵀ M L`` ``[m, m]``.

    Attributes:
        weight: W ``[m, n]``.
        left: L ``[m, m]``, lower triangular; None for the identity.
        gram: in the dtype of W, like the other tensors.
        scale: sum of the magnitudes that were added up for the diagonal of ``gram``.
    """

    weight: Tensor
    left: Tensor | None
    gram: Tensor
    scale: float

    @property
    def least_loss(self) -> float:
        """The smallest loss that is reliable despite rounding."""
        return _least_loss(self.gram, self.scale)

    def factors(self, _values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``U = L⁻ᵀ Q`` and ``V = Qᵀ Lᵀ W`` for eigenvectors Q ``[m, k]``."""
        if self.left is None:
            return vectors, vectors.T @ self.weight
        u = torch.linalg.solve_triangular(self.left.T, vectors, upper=True)
        return u, vectors.T @ (self.left.T @ self.weight)


@dataclass(frozen=True)
class _Narrow:
    """The eigenproblem of ``gram = Rᵀ C R`` ``[n, n]`` for m > n, with C = WᵀW and G = R Rᵀ.

    Attributes:
        weight: W ``[m, n]``.
        columns: C ``[n, n]``; the part above the diagonal may be undefined.
        root: R ``[n, n]``, lower triangular; None for the identity.
        gram: in the dtype of W, like the other tensors.
    """

    weight: Tensor
    columns: Tensor
    root: Tensor | None
    gram: Tensor

    @property
    def least_loss(self) -> float:
        """The smallest loss that is reliable despite rounding."""
        return _least_loss(self.gram, float(self.gram.diagonal().double().sum()))

    def factors(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return ``U = W R E Λ^-½`` ``[m, k]``, orthonormal, and ``V = Uᵀ W`` for eigenvalues Λ and
        eigenvectors E. None if U cannot be orthonormalized because of rounding."""
        directions = vectors / values.sqrt()
        if self.root is not None:
            directions = triangular_product(self.root, directions)
        multiplied = product if serves(self.weight) else torch.mm
        u = multiplied(self.weight, directions)
        if float((_norms(u) - 1).abs().max()) < _SKEW:
            return u, self._right(values, vectors, directions)
        made = orthonormal(u)
        return None if made is None else (made, made.T @ self.weight)

    def _right(self, values: Tensor, vectors: Tensor, directions: Tensor) -> Tensor:
        """Return V ``[k, n]`` as ``(R E Λ^-½)ᵀ C``, which needs no inverse, or, if R is far from
        singular, as the equivalent ``Λ^½ Eᵀ R⁻¹``, in half the time."""
        if self.root is None or not _is_invertible(self.root):
            return directions.T @ filled(self.columns)
        scaled = (vectors * values.sqrt()).T
        v: Tensor = torch.linalg.solve_triangular(self.root, scaled, upper=False, left=False)
        return v


def _norms(matrix: Tensor) -> Tensor:
    """Return the column norms ``[k]``, computed on row chunks that fit the cache (11008 × 1792 in
    float32 on two cores: 4 ms instead of torch's 49 ms)."""
    return torch.stack([part.square().sum(0) for part in matrix.split(512)]).sum(0).sqrt()


def _least_loss(gram: Tensor, scale: float) -> float:
    return torch.finfo(gram.dtype).eps * math.sqrt(len(gram)) * scale / TOLERANCE


def _pose(dtype: torch.dtype, weight: Tensor, metric: Metric) -> _Wide | _Narrow | None:
    """Return the eigenproblem on the smaller side of W; None if this module does not apply."""
    moment, left = metric.right, metric.left
    if min(weight.shape) < LEAST_SIZE:
        return None
    if dtype == torch.float32 and has_fast_doubles(weight.device):
        return None
    if isinstance(moment, Tensor) or (left is not None and left.ndim == 1):
        return None
    wide = weight.to(dtype)
    matrix = None if moment is None else moment.matrix.to(dtype)
    # A non-finite sum implies a non-finite term; 20 times faster than testing every term.
    if not bool((wide if matrix is None else matrix).sum().isfinite()):
        return None
    if left is None and metric.narrows(weight):
        columns = lower_gram(wide.T)
        if matrix is None:
            return _Narrow(wide, columns, None, filled(columns))
        root = _root(matrix)
        if root is None:
            return None
        return _Narrow(wide, columns, root, triangular_congruence(root, columns))
    if matrix is None:
        energy = gram(wide)
    else:
        energy = matrix if metric.knows_outputs else congruence(wide, matrix)
    if left is None:
        return _Wide(wide, None, energy, float(energy.diagonal().double().sum()))
    scale = float((left.double().square().sum(1) * energy.diagonal().double()).sum())
    lower = left.to(dtype)
    return _Wide(wide, lower, congruence(lower.T, energy), scale)


def has_fast_doubles(device: torch.device) -> bool:
    """Return whether float64 takes at most twice the time of float32: true for A100, H100, B200 and
    related GPUs; false for other GPUs and CPUs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_DOUBLES


def _is_invertible(root: Tensor) -> bool:
    pivots = root.diagonal()
    return float(pivots.max()) < _MOST_SPREAD * float(pivots.min())


def _root(matrix: Tensor) -> Tensor | None:
    """Return the lower triangular R of G = R Rᵀ; None if G is zero."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return root
    exact = triangular_root(matrix.double())
    return None if exact is None else exact.to(matrix.dtype)


def _most_loss(gram: Tensor, rank: int) -> float:
    """Return an upper bound of the truncation loss: the trace minus some large eigenvalues, scaled
    to the number of dropped components."""
    size = len(gram)
    count = min(_PROBES, rank)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, count, generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(2):
        basis = torch.linalg.qr(gram @ basis).Q
    large = float((basis * (gram @ basis)).double().sum())
    total = float(gram.diagonal().double().sum())
    return (total - large) * (size - rank) / (size - count)
