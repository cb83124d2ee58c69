"""Predicted loss of rounding the numbers of a sublayer.

Legend: W ``[m, n]``, rounding error E = W − W̃; G ``[n, n]`` and H ``[m, m]`` weight inputs and
outputs in a metric, ``loss(E) = tr(H E G Eᵀ)``. Rounding errors are nearly uncorrelated, so that
the diagonals suffice: ``loss(E) = Σ_ij H_ii E_ij² G_jj``. On 21 sublayers of SmolLM2-135M this is
within 12 % of the loss in the full metric, mostly within 3 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.linalg.statistics import Statistics, required

Round = Callable[[Tensor], Tensor]
"""``W [m, n] -> W̃ [m, n]``: rounds and dequantizes a matrix."""


@dataclass(frozen=True)
class Rounding:
    """The effect of rounding W.

    Attributes:
        noise: η = ‖E‖² / ‖W‖², the noise-to-signal ratio.
        loss: D = loss(E).
    """

    noise: float
    loss: float

    def compensated(self, bits: int) -> Rounding:
        """Return the effect if later numbers compensate each error (GPTQ)."""
        noise, loss = _COMPENSATED[bits]
        return Rounding(noise * self.noise, loss * self.loss)


_COMPENSATED = {8: (1.0, 0.25), 4: (0.15, 0.27)}
"""Bits → the shares of the noise of U and of the loss of W that remain with GPTQ. The inputs of U
are nearly independent, so that errors cannot be compensated; at 4 bits they are rotated first.
Geometric means over 12 sublayers of SmolLM2-135M; single values are 0.6 to 2 times as large."""


@dataclass(frozen=True)
class Diagonals:
    """The diagonals of a metric; None weights all inputs or outputs alike.

    Attributes:
        inputs: the diagonal of G ``[n]``.
        outputs: the diagonal of H ``[m]``.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


def rounding(weight: Tensor, rounded: Round, weights: Diagonals) -> Rounding:
    """Return the effect of rounding W ``[m, n]``; noise 0 for a zero matrix."""
    wide = weight.double()
    squares = (wide - rounded(weight).double()).square()
    total = float(wide.square().sum())
    noise = float(squares.sum()) / total if total else 0.0
    if weights.inputs is not None:
        squares = squares * weights.inputs.to(squares)
    if weights.outputs is not None:
        squares = squares * weights.outputs.to(squares)[:, None]
    return Rounding(noise, float(squares.sum()))


def diagonals(
    metric: str, rows: int, statistics: Statistics, input_shrinkage: float, output_shrinkage: float
) -> Diagonals:
    """Return the diagonals of the plan's metric for a sublayer.

    Args:
        metric: whitened, fisher, held-out or weight.
        rows: m.
        statistics: the moment or channel means, and the gradient.
        input_shrinkage: s of G in the fisher metrics, from 0 to 1.
        output_shrinkage: s of H.

    Raises:
        SourceError: statistics that the metric needs are missing.
    """
    if metric == "weight":
        return Diagonals()
    moment = required(statistics.moment, metric, "moments")
    if moment.side == "input":
        inputs = moment.matrix.diagonal().double()
    else:
        inputs = required(statistics.channels, metric, "moments").mean_square.double()
    if metric == "whitened":
        return Diagonals(inputs)
    gradient = required(statistics.gradient, metric, "gradients")
    if gradient.moment.side == "output":
        outputs = gradient.moment.matrix.diagonal().double()
    else:  # only the mean of H is known
        outputs = torch.full((rows,), gradient.mean_square, dtype=torch.float64)
    return Diagonals(_shrunk(inputs, input_shrinkage), _shrunk(outputs, output_shrinkage))


def _shrunk(diagonal: Tensor, shrinkage: float) -> Tensor:
    return (1 - shrinkage) * diagonal + shrinkage * diagonal.mean()
