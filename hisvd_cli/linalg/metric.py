"""The weighted error that a decomposition minimizes.

Legend: W ``[m, n]``, Δ = W − W′ the error of a replacement, p = min(m, n). A metric weights the
outputs by H = L Lᵀ ``[m, m]`` and the inputs by G ``[n, n]``: ``loss(Δ) = tr(H Δ G Δᵀ)``.

With A = Lᵀ W G^½, the best W′ of rank k is ``L⁻ᵀ Q_k Q_kᵀ Lᵀ W``, Q_k the top eigenvectors of
``A Aᵀ = Lᵀ W G Wᵀ L``, and its loss is the sum of the eigenvalues beyond k (Eckart and Young 1936).
This requires neither a root nor an inverse of G: G may be singular, and M = W G Wᵀ is sufficient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.linalg.moments import Moment, Side
from hisvd_cli.linalg.statistics import Channels, Statistics, required
from hisvd_cli.utils.errors import NumericalError, SourceError

FLOOR = 1e-12
"""Minimum damping of H, relative to the mean of its diagonal. It makes L invertible if H is
singular; other results change by no more than rounding."""
_RAISE = 100.0  # factor by which an insufficient damping is raised


@dataclass(frozen=True)
class Metric:
    """The weights of an error.

    Attributes:
        left: L ``[m, m]``, lower triangular, or the diagonal of a diagonal L ``[m]``; None for the
            identity.
        right: the second moment G, or M = W G Wᵀ, or the diagonal of a diagonal G ``[n]``; None
            for the identity.
        transposed: the metric applies to Wᵀ: left is the root of G, right is H or Wᵀ H W.
    """

    left: Tensor | None = None
    right: Moment | Tensor | None = None
    transposed: bool = False

    def weigh(self, matrix: Tensor) -> Tensor:
        """Return Lᵀ X ``[m, c]`` for X ``[m, c]``."""
        if self.left is None:
            return matrix
        return self.left[:, None] * matrix if self.left.ndim == 1 else self.left.T @ matrix

    def unweigh(self, matrix: Tensor) -> Tensor:
        """Return L⁻ᵀ X ``[m, c]`` for X ``[m, c]``."""
        if self.left is None:
            return matrix
        if self.left.ndim == 1:
            return matrix / self.left[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.left.T, matrix, upper=True)
        return solved

    def narrows(self, weight: Tensor) -> bool:
        """Return whether A Aᵀ has a smaller equivalent ``[n, n]``, which requires G, not M."""
        return weight.shape[0] > weight.shape[1] and not self.knows_outputs

    @property
    def knows_outputs(self) -> bool:
        """Whether the right side is M instead of G."""
        return isinstance(self.right, Moment) and self.right.side == "output"

    def gram(self, weighted: Tensor) -> Tensor:
        """Return B G Bᵀ ``[r, r]`` for B ``[r, n]``; for B = Lᵀ W this is A Aᵀ.

        If M is known instead of G, B must be Lᵀ W, and the result is Lᵀ M L.
        """
        if self.right is None:
            return weighted @ weighted.T
        if not isinstance(self.right, Moment):
            return (weighted * self.right) @ weighted.T
        if self.right.side == "output":
            return self.weigh(self.weigh(self.right.matrix.double()).T)
        return self.right.of_output(weighted)

    def whitened(self, weighted: Tensor) -> Tensor:
        """Return a root of B G Bᵀ ``[r, r]`` for B ``[r, n]``, up to damping; B G^½ if G is known.

        Raises:
            NumericalError: see :func:`triangular_root`.
        """
        if self.right is None:
            return weighted
        if not isinstance(self.right, Moment):
            return weighted * self.right.clamp_min(0).sqrt()
        root = triangular_root(self.right.matrix.double())
        if root is None:
            return torch.zeros_like(weighted)
        return self.weigh(root) if self.right.side == "output" else weighted @ root


def fisher_metric(
    weight: Tensor, statistics: Statistics, input_shrinkage: float, output_shrinkage: float
) -> Metric:
    """Return the K-FAC metric of the loss (Martens and Grosse 2015), with shrinkage of H and G.

    Args:
        weight: W ``[m, n]``.
        statistics: moment and gradient of the sublayer; also its channels if the moment is M.
        input_shrinkage: shrinkage s of G, from 0 to 1.
        output_shrinkage: shrinkage s of H, from 0 to 1.

    Raises:
        SourceError: the moment or the gradient is missing, or neither G nor H is known directly.
        NumericalError: see :func:`triangular_root`.
    """
    moment = required(statistics.moment, "fisher", "moments")
    gradient = required(statistics.gradient, "fisher", "gradients")
    inputs = _shrunk_inputs(weight, moment, statistics.channels, input_shrinkage)
    outputs = _mixed(
        gradient.moment, weight.double().T, gradient.mean_square, output_shrinkage, "output"
    )
    if not gradient.mean_square:
        return Metric(right=inputs)
    if gradient.moment.side == "output":
        return Metric(triangular_root(outputs.matrix), inputs)
    if moment.side == "output":
        raise SourceError(
            f"For a weight {list(weight.shape)}, the calibration holds the moment of the output "
            "and the gradient moment of the input; the fisher metric needs one on its own side.",
            "Calibrate again.",
        )
    return Metric(triangular_root(inputs.matrix), Moment(outputs.matrix, "output"), transposed=True)


def _shrunk_inputs(
    weight: Tensor, moment: Moment, channels: Channels | None, shrinkage: float
) -> Moment:
    """Return G, or M = W G Wᵀ, after shrinkage of G."""
    square = 0.0
    if shrinkage and moment.side == "output":
        square = float(required(channels, "fisher", "moments").mean_square.double().mean())
    return _mixed(moment, weight.double(), square, shrinkage, "input")


def _mixed(
    moment: Moment, matrix: Tensor, mean_square: float, shrinkage: float, own: Side
) -> Moment:
    """Apply shrinkage of A to a moment that is A itself or X A Xᵀ, which is linear in A.

    Args:
        moment: A (on the side ``own``) or X A Xᵀ (on the other).
        matrix: X.
        mean_square: mean of the diagonal of A, for when only X A Xᵀ is known.
        shrinkage: s.
        own: the side of A.
    """
    known = moment.matrix.double()
    if moment.side == own:
        return Moment(shrunk(known, shrinkage), moment.side)
    mixed = (1 - shrinkage) * known + shrinkage * mean_square * (matrix @ matrix.T)
    return Moment(mixed, moment.side)


def shrunk(matrix: Tensor, shrinkage: float) -> Tensor:
    """Return ``(1 − s)·A + s·mean(diag A)·I`` (Ledoit and Wolf 2004) for A ``[k, k]``."""
    mixed = (1 - shrinkage) * matrix
    mixed.diagonal().add_(shrinkage * matrix.diagonal().mean())
    return mixed


def triangular_root(matrix: Tensor, damping: float = FLOOR) -> Tensor | None:
    """Return L ``[m, m]``, lower triangular, with L Lᵀ = H up to damping; None if H is zero.

    Args:
        matrix: H ``[m, m]`` in float64.
        damping: positive; added to the diagonal, relative to its mean. If rounding gave H negative
            eigenvalues, it is raised by factors of 100 until the factorization succeeds.

    Raises:
        NumericalError: H is not finite, or far from positive semidefinite.
    """
    if _is_zero(matrix):
        return None
    while damping < 1:
        damped = matrix.clone()
        damped.diagonal().add_(damping * matrix.diagonal().mean())
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return root
        damping *= _RAISE
    raise NumericalError(
        f"A second moment {list(matrix.shape)} is not positive semidefinite.",
        "Calibrate again.",
    )


def diagonal_root(values: Tensor) -> Tensor | None:
    """Return L ``[m]`` of a diagonal H ``[m]``, damped by ``FLOOR``; None if H is zero.

    Raises:
        NumericalError: H is not finite.
    """
    wide = values.double()
    return None if _is_zero(wide) else (wide + FLOOR * wide.mean()).sqrt()


def _is_zero(matrix: Tensor) -> bool:
    """Return whether all values are zero. Raises NumericalError if one is not finite."""
    if not bool(matrix.isfinite().all()):
        raise NumericalError(
            f"A second moment {list(matrix.shape)} is not finite.",
            "Calibrate again with `model.dtype` float32.",
        )
    return not bool(matrix.any())
