"""Truncation of large matrices in as much precision as the result needs.

Everything in float32 takes a CPU half the time, and most GPUs a fraction. Rounding moves the
eigenvalues of ``Lᵀ W G Wᵀ L`` by about ε times their sum each, and the loss of a truncation by no
more than √p times that. Where the loss itself is large beside it, the truncation is as good as the
exact one; where it is not, as for a layer whose inputs have a few huge channels, the answer is None
and float64 must do.
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
"""How much of the optimal loss the bound on rounding may be. The bound is loose: where it was
5e-3, rounding added 1e-5 of the loss or less, and 5e-3 where it was 1.3e-2."""
LEAST_SIZE = 1024
"""Smaller matrices take no time worth saving."""
_PROBES = 64
_MOST_SPREAD = 1e2
"""Between the diagonal's numbers of a triangle that is solved with."""
_SKEW = 1e-3
_ALIGNED = 16
"""Products whose sizes are multiples of this take two thirds of the time (4096 × 11008 × 1790, in
float32 on a CPU: 1.28 s; × 1792: 0.86 s), so a few components more are found, and dropped."""

_FAST_DOUBLES = {(8, 0), (9, 0), (10, 0)}  # compute capabilities


def truncate_in(
    dtype: torch.dtype, weight: Tensor, metric: Metric, rank: int, solver: Solver = "auto"
) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the best replacement of W of rank k, from products in a precision.

    Args:
        dtype: float32 or float64.
        weight: W ``[m, n]``.
        metric: what is minimised; not transposed.
        rank: k.
        solver: finds the eigenvectors.

    Returns:
        U ``[m, k]`` and V ``[k, n]`` in it; None where it may not be enough, or W is small.

    Raises:
        LinAlgError: the eigenvectors did not converge.
    """
    if rank >= min(weight.shape):
        return None
    problem = _pose(dtype, weight, metric)
    # Before the work of finding eigenvectors: what a truncation loses at most.
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
    """Return the eigenvalues ``[min(m, n)]`` that :func:`truncate_in` finds vectors of, falling and
    in float64; None where those of the lesser half may be no more than rounding.

    Args:
        dtype: in which they are found, float32 or float64.
        weight: W ``[m, n]``.
        metric: not transposed.

    Raises:
        LinAlgError: they did not converge.
    """
    problem = _pose(dtype, weight, metric)
    if problem is None:
        return None
    values = torch.linalg.eigvalsh(problem.gram).flip(0).double()
    return values if float(values[len(values) // 2 :].sum()) >= problem.least_loss else None


@dataclass(frozen=True)
class _Wide:
    """Eigenvectors of ``gram = Lᵀ M L`` ``[m, m]`` are wanted.

    Attributes:
        weight: W ``[m, n]``.
        left: L ``[m, m]``, lower triangular; None for the identity.
        gram: in the dtype of W, as all here.
        scale: the sum of what was added up for the diagonal of ``gram``.
    """

    weight: Tensor
    left: Tensor | None
    gram: Tensor
    scale: float

    @property
    def least_loss(self) -> float:
        """The least loss that stands above rounding."""
        return _least_loss(self.gram, self.scale)

    def factors(self, _values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``U = L⁻ᵀ Q`` and ``V = Qᵀ Lᵀ W`` for eigenvectors Q ``[m, k]``."""
        if self.left is None:
            return vectors, vectors.T @ self.weight
        u = torch.linalg.solve_triangular(self.left.T, vectors, upper=True)
        return u, vectors.T @ (self.left.T @ self.weight)


@dataclass(frozen=True)
class _Narrow:
    """m > n: eigenvectors of ``gram = Rᵀ C R`` ``[n, n]`` are wanted, C = WᵀW and G = R Rᵀ.

    Attributes:
        weight: W ``[m, n]``.
        columns: C ``[n, n]``, of which what is above the diagonal may be missing.
        root: R ``[n, n]``, lower triangular; None for the identity.
        gram: in the dtype of W, as all here.
    """

    weight: Tensor
    columns: Tensor
    root: Tensor | None
    gram: Tensor

    @property
    def least_loss(self) -> float:
        """The least loss that stands above rounding."""
        return _least_loss(self.gram, float(self.gram.diagonal().double().sum()))

    def factors(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return ``U = W R E Λ^-½`` ``[m, k]``, orthonormal, and ``V = Uᵀ W`` for eigenvalues Λ and
        eigenvectors E. None where rounding leaves no U."""
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
        """Return V ``[k, n]`` as ``(R E Λ^-½)ᵀ C``, without an inverse of anything; or, where R is
        far from singular, as ``Λ^½ Eᵀ R⁻¹``, which is the same in half the time."""
        if self.root is None or not _is_invertible(self.root):
            return directions.T @ filled(self.columns)
        scaled = (vectors * values.sqrt()).T
        v: Tensor = torch.linalg.solve_triangular(self.root, scaled, upper=False, left=False)
        return v


def _norms(matrix: Tensor) -> Tensor:
    """Return the norms ``[k]`` of the columns, by rows that stay in a cache (11008 × 1792 in
    float32, two cores: 4 ms, where torch's own take 49)."""
    return torch.stack([part.square().sum(0) for part in matrix.split(512)]).sum(0).sqrt()


def _least_loss(gram: Tensor, scale: float) -> float:
    return torch.finfo(gram.dtype).eps * math.sqrt(len(gram)) * scale / TOLERANCE


def _pose(dtype: torch.dtype, weight: Tensor, metric: Metric) -> _Wide | _Narrow | None:
    """Return the eigenproblem on the smaller side of W; None where this is not for it."""
    moment, left = metric.right, metric.left
    if min(weight.shape) < LEAST_SIZE:
        return None
    if dtype == torch.float32 and has_fast_doubles(weight.device):
        return None
    if isinstance(moment, Tensor) or (left is not None and left.ndim == 1):
        return None
    wide = weight.to(dtype)
    matrix = None if moment is None else moment.matrix.to(dtype)
    # A sum that is not finite stands for its terms, in a twentieth of the time of their tests.
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
    """Tell whether float64 costs a GPU no more than twice what float32 does: A100, H100, B200 and
    their kin; other GPUs, and CPUs, do not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_DOUBLES


def _is_invertible(root: Tensor) -> bool:
    pivots = root.diagonal()
    return float(pivots.max()) < _MOST_SPREAD * float(pivots.min())


def _root(matrix: Tensor) -> Tensor | None:
    """Return R of G = R Rᵀ, lower triangular; None where G is zero."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return root
    exact = triangular_root(matrix.double())
    return None if exact is None else exact.to(matrix.dtype)


def _most_loss(gram: Tensor, rank: int) -> float:
    """Return what a truncation loses at most: all eigenvalues but some large ones, those beyond the
    rank no larger than the others."""
    size = len(gram)
    count = min(_PROBES, rank)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, count, generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(2):
        basis = torch.linalg.qr(gram @ basis).Q
    large = float((basis * (gram @ basis)).double().sum())
    total = float(gram.diagonal().double().sum())
    return (total - large) * (size - rank) / (size - count)
