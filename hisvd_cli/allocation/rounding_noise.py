"""What rounding a sublayer's numbers to few bits loses, before anything is rounded for good.

Legend: W ``[m, n]``, E = W − W̃ the error of rounding it; G ``[n, n]`` and H ``[m, m]`` weight
inputs and outputs in a metric, ``loss(E) = tr(H E G Eᵀ)``. Errors of rounding hardly correlate, so
the diagonals do: ``loss(E) = Σ_ij H_ii E_ij² G_jj``. Seen on 21 sublayers of SmolLM2-135M: within
12 % of the loss in the full metric, most within 3 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.linalg.statistics import Statistics, required

Round = Callable[[Tensor], Tensor]
"""``W [m, n] -> W̃ [m, n]``: a matrix as it comes back from what it is stored as."""


@dataclass(frozen=True)
class Rounding:
    """What rounding W to some bits does.

    Attributes:
        noise: η = ‖E‖² / ‖W‖², the noise beside the signal.
        loss: D = loss(E), what W loses by it.
    """

    noise: float
    loss: float

    def compensated(self, bits: int) -> Rounding:
        """Return it where each error is made up for in what is rounded after it (GPTQ)."""
        noise, loss = _COMPENSATED[bits]
        return Rounding(noise * self.noise, loss * self.loss)


_COMPENSATED = {8: (1.0, 0.25), 4: (0.15, 0.27)}
"""Bits → what GPTQ leaves of the noise of U and of the loss of W. What U is given has components
that are nearly independent, so that nothing can be made up for; with 4 bits they are rotated into
each other first. Geometric means over 12 sublayers of SmolLM2-135M, of which single ones are from
0.6 to 2 times as large."""


@dataclass(frozen=True)
class Diagonals:
    """How a metric weights single inputs and outputs; None weights them alike.

    Attributes:
        inputs: the diagonal of G ``[n]``.
        outputs: the diagonal of H ``[m]``.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


def rounding(weight: Tensor, rounded: Round, weights: Diagonals) -> Rounding:
    """Return what rounding W ``[m, n]`` does; no noise at all in a matrix of zeros."""
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
    """Return how a plan's metric weights the inputs and outputs of a sublayer.

    Args:
        metric: whitened, fisher, held-out or weight.
        rows: m.
        statistics: its moment or channels, and its gradient.
        input_shrinkage: s of G in the fisher metrics, from 0 to 1.
        output_shrinkage: s of H.

    Raises:
        SourceError: statistics that the metric needs were not taken.
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
    else:  # of H itself no more than the mean is known
        outputs = torch.full((rows,), gradient.mean_square, dtype=torch.float64)
    return Diagonals(_shrunk(inputs, input_shrinkage), _shrunk(outputs, output_shrinkage))


def _shrunk(diagonal: Tensor, shrinkage: float) -> Tensor:
    return (1 - shrinkage) * diagonal + shrinkage * diagonal.mean()
