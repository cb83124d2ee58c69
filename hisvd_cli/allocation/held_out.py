"""What a truncation loses on tokens that it was not fitted to.

Energies of the tokens that a metric was taken from say too little of what is lost elsewhere, and
say it of some sublayers more than of others: few directions of a value projection's gradient
repeat from text to text. So the calibration text is halved; the weight is decomposed in the metric
of one half, and its loss is measured in that of the other, both ways round.

Legend: W ``[m, n]`` = U V, p = min(m, n) components; the loss of rank r on other text is
``tr(H Δ G Δᵀ)`` with Δ = Σ_{i ≥ r} u_i v_iᵀ, so Σ_{i,j ≥ r} (u_iᵀ H u_j)(v_iᵀ G v_j).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hisvd_cli.linalg.convex_hull import lower_hull
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Statistics, required

Factors = Callable[[Statistics], tuple[Tensor, Tensor]]
"""``statistics -> (U [m, p], V [p, n])``: W itself, best component first."""


def held_out_energy(statistics: Statistics, factors: Factors) -> Tensor:
    """Return what dropping each component loses on text that the components were not chosen on.

    The mean of both ways round; of the losses over ranks the largest convex curve below them, so
    that what each further component loses falls.

    Args:
        statistics: of both halves of the text.
        factors: decomposes the weight by the statistics of one half.

    Returns:
        Energies ``[p]``, falling, in float64 on the CPU.

    Raises:
        SourceError: the statistics were not taken in halves.
    """
    one, other = required(statistics.halves, "held-out", "gradients")
    curves = [
        held_out_losses(*factors(fitted), unseen) for fitted, unseen in ((one, other), (other, one))
    ]
    return _convex_steps(torch.stack(curves).mean(0).cpu())


def held_out_losses(u: Tensor, v: Tensor, unseen: Statistics) -> Tensor:
    """Return the loss of each rank, 0 to p, in the metric of other text ``[p + 1]``, float64.

    Args:
        u: U ``[m, p]`` in float64.
        v: V ``[p, n]`` in float64; U V is the weight.
        unseen: moment and gradient of the other text.

    Raises:
        SourceError: without a moment or a gradient.
    """
    moment = required(unseen.moment, "held-out", "moments")
    gradient = required(unseen.gradient, "held-out", "gradients").moment
    left = _products(gradient, u.T, v.T, own="output")  # Uᵀ H U
    right = _products(moment, v, u, own="input")  # V G Vᵀ
    joint = left * right
    suffixes = joint.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
    return torch.cat([suffixes, suffixes.new_zeros(1)])


def _products(moment: Moment, rows: Tensor, other: Tensor, own: str) -> Tensor:
    """Return ``R A Rᵀ`` ``[p, p]``; of A known as X A Xᵀ only, X = ``other``·R is undone first."""
    matrix = moment.matrix.double()
    if moment.side == own:
        products: Tensor = rows @ matrix @ rows.T
        return products
    square = other.shape[0] == other.shape[1]
    inverse: Tensor = torch.linalg.inv(other) if square else torch.linalg.pinv(other)
    return inverse @ matrix @ inverse.T


def _convex_steps(losses: Tensor) -> Tensor:
    """Return the falls from rank to rank of the largest convex, falling curve below ``losses``."""
    values = losses.tolist()
    corners = lower_hull(range(len(values)), values)
    steps: list[float] = []
    for start, end in pairwise(corners):
        steps += [(values[start] - values[end]) / (end - start)] * (end - start)
    steps += [0.0] * (len(values) - 1 - len(steps))
    return torch.tensor(steps, dtype=torch.float64)
