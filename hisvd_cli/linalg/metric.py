"""The weighted error that a decomposition minimises.

Legend: W ``[m, n]``, Δ = W − W′ the error of a replacement, p = min(m, n). A metric weights the
outputs by H = L Lᵀ ``[m, m]`` and the inputs by G ``[n, n]``: ``loss(Δ) = tr(H Δ G Δᵀ)``.

With A = Lᵀ W G^½, the best W′ of rank k is ``L⁻ᵀ Q_k Q_kᵀ Lᵀ W``, Q_k the top eigenvectors of
``A Aᵀ = Lᵀ W G Wᵀ L``, and the eigenvalues beyond k add up to its loss (Eckart and Young 1936). So
no root and no inverse of G is ever taken, G may be singular, and M = W G Wᵀ will do in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.linalg.moments import Moment, Side
from hisvd_cli.linalg.statistics import Channels, Statistics, required
from hisvd_cli.utils.errors import NumericalError, SourceError

FLOOR = 1e-12
"""The least damping of H, relative to the mean of its diagonal: L can be inverted where H is
singular, and all else changes by no more than rounding."""
_RAISE = 100.0  # a damping that did not do is raised so much


@dataclass(frozen=True)
class Metric:
    """How an error is weighted.

    Attributes:
        left: L ``[m, m]``, lower triangular, or the diagonal of a diagonal one ``[m]``; None
            weights all outputs alike.
        right: the second moment G, or M = W G Wᵀ, or the diagonal of a diagonal G ``[n]``; None
            weights all inputs alike.
        transposed: it is a metric for Wᵀ: left is the root of G, right is H or Wᵀ H W.
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
        """Return whether A Aᵀ has a smaller equivalent ``[n, n]``; with M in place of G it has
        none."""
        return weight.shape[0] > weight.shape[1] and not self.knows_outputs

    @property
    def knows_outputs(self) -> bool:
        """Whether the right side is M, and not G."""
        return isinstance(self.right, Moment) and self.right.side == "output"

    def gram(self, weighted: Tensor) -> Tensor:
        """Return B G Bᵀ ``[r, r]`` for B ``[r, n]``: A Aᵀ where B = Lᵀ W.

        Where M is known in place of G, B can be nothing but Lᵀ W, and the answer is Lᵀ M L.
        """
        if self.right is None:
            return weighted @ weighted.T
        if not isinstance(self.right, Moment):
            return (weighted * self.right) @ weighted.T
        if self.right.side == "output":
            return self.weigh(self.weigh(self.right.matrix.double()).T)
        return self.right.of_output(weighted)

    def whitened(self, weighted: Tensor) -> Tensor:
        """Return a root of B G Bᵀ ``[r, r]`` for B ``[r, n]``, up to damping: B G^½ where G is
        known.

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
    """Return the K-FAC metric of the loss (Martens and Grosse 2015), H and G shrunk.

    Args:
        weight: W ``[m, n]``.
        statistics: its moment and gradient; the channels too, where the moment is M.
        input_shrinkage: s of G, from 0 to 1.
        output_shrinkage: s of H.

    Raises:
        SourceError: without a moment or a gradient, or with both on the far side of W.
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
            f"A weight {list(weight.shape)} has the moment of its output, and the gradient's at "
            "its input: no root of either side is known.",
            "Calibrate again.",
        )
    return Metric(triangular_root(inputs.matrix), Moment(outputs.matrix, "output"), transposed=True)


def _shrunk_inputs(
    weight: Tensor, moment: Moment, channels: Channels | None, shrinkage: float
) -> Moment:
    """Return G, or M = W G Wᵀ, with G shrunk."""
    square = 0.0
    if shrinkage and moment.side == "output":
        square = float(required(channels, "fisher", "moments").mean_square.double().mean())
    return _mixed(moment, weight.double(), square, shrinkage, "input")


def _mixed(
    moment: Moment, matrix: Tensor, mean_square: float, shrinkage: float, own: Side
) -> Moment:
    """Return a moment whose underlying A is shrunk: A itself on its ``own`` side, or X A Xᵀ on the
    other, which is linear in A.

    Args:
        moment: A, or X A Xᵀ.
        matrix: X.
        mean_square: the mean of the diagonal of A, where only X A Xᵀ is known.
        shrinkage: s.
        own: the side on which A itself lies.
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
    """Return L ``[m, m]``, lower triangular, with L Lᵀ = H up to a damping; None where H is zero.

    Args:
        matrix: H ``[m, m]`` in float64.
        damping: above 0; what is added to the diagonal, relative to its mean. Where rounding has
            left H with negative eigenvalues, it is raised hundredfold until they are gone.

    Raises:
        NumericalError: not finite, or far from positive semidefinite.
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
        f"A second moment of gradients {list(matrix.shape)} is not positive semidefinite.",
        "Calibrate again.",
    )


def diagonal_root(values: Tensor) -> Tensor | None:
    """Return L ``[m]`` of a diagonal H ``[m]``, its zeros raised to the floor; None where all
    are zero.

    Raises:
        NumericalError: not finite.
    """
    wide = values.double()
    return None if _is_zero(wide) else (wide + FLOOR * wide.mean()).sqrt()


def _is_zero(matrix: Tensor) -> bool:
    """Return whether all is zero. Raises NumericalError where something is not finite."""
    if not bool(matrix.isfinite().all()):
        raise NumericalError(
            f"A second moment of gradients {list(matrix.shape)} is not finite.",
            "Calibrate again with --dtype float32.",
        )
    return not bool(matrix.any())
