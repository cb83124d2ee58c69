"""Energies of weight matrices in each metric: the loss that each component contributes if dropped.

Legend: W ``[m, n]`` = U V, p = min(m, n) components, energies σ² ``[p]``, falling, in float64.

Energies in a metric underestimate the loss on other text, by an amount that varies between
sublayers: few gradient directions of a value projection recur from text to text. ``held_out``
energies therefore use two halves of the calibration text: the weight is decomposed in the metric of
one half, the loss is measured in the metric of the other, and the two results are averaged. The
loss of rank r on other text is ``tr(H Δ G Δᵀ)`` with Δ = Σ_{i ≥ r} u_i v_iᵀ, that is
Σ_{i,j ≥ r} (u_iᵀ H u_j)(v_iᵀ G v_j).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hisvd_cli.linalg.convex_hull import lower_hull
from hisvd_cli.linalg.metric import Metric, fisher_metric
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Statistics, required
from hisvd_cli.linalg.truncation import energies, truncate

Factors = Callable[[Statistics], tuple[Tensor, Tensor]]
"""``statistics -> (U [m, p], V [p, n])``: all components of W, best first."""


def whitened_energy(weight: Tensor, moment: Moment) -> Tensor:
    """Return σ² of ``W G^½``, the eigenvalues of ``W G Wᵀ``, on the smaller side.

    Its sum over j > k is the mean squared output error of the best rank-k approximation of W.
    """
    return energies(weight, Metric(right=moment))


def weight_energy(weight: Tensor) -> Tensor:
    """Return σ² of W."""
    return energies(weight, Metric())


def fisher_energy(
    weight: Tensor, statistics: Statistics, input_shrinkage: float, output_shrinkage: float
) -> Tensor:
    """Return the energies in the K-FAC metric, σ² of ``L_Hᵀ W L_G`` ``[min(m, n)]``.

    The sum over j > k is ``tr(H Δ G Δᵀ)``, with H and G shrunk, of the best rank-k approximation.
    All are zero if the loss does not depend on the sublayer (H = 0).

    Args:
        weight: W ``[m, n]``.
        statistics: see :func:`hisvd_cli.linalg.metric.fisher_metric`, also for what it raises.
        input_shrinkage: s of G, from 0 to 1.
        output_shrinkage: s of H.
    """
    metric = fisher_metric(weight, statistics, input_shrinkage, output_shrinkage)
    if metric.left is None:
        return torch.zeros(min(weight.shape), dtype=torch.float64)
    return energies(weight, metric)


def held_out_fisher_energy(
    weight: Tensor, statistics: Statistics, input_shrinkage: float, output_shrinkage: float
) -> Tensor:
    """Return the energies in the K-FAC metric on held-out text ``[min(m, n)]``.

    Args:
        weight: W ``[m, n]``.
        statistics: of both halves of the text; otherwise as for :func:`fisher_energy`.
        input_shrinkage: s of G, from 0 to 1.
        output_shrinkage: s of H.
    """

    def factors(half: Statistics) -> tuple[Tensor, Tensor]:
        metric = fisher_metric(weight, half, input_shrinkage, output_shrinkage)
        return truncate(weight, metric, min(weight.shape))

    return held_out_energy(statistics, factors)


def component_changes(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return the first-order change of the loss if each whitened component is dropped (ZS-SVD).

    With ``W S = Σ σ_i u_i v_iᵀ``, S Sᵀ = G, it is ``δ_i = −σ_i·u_iᵀ(∂L/∂W·S⁻ᵀ)v_i``. As
    ``σ_i u_i v_iᵀ S⁻¹ = u_i u_iᵀ W``, this is ``−⟨∂L/∂W, u_i u_iᵀ W⟩``: it needs no inverse and
    holds for any root S.

    Args:
        weight: W ``[m, n]``.
        statistics: the moment, and weight gradients with mean ∂L/∂W.

    Returns:
        δ ``[min(m, n)]`` in order of falling σ, in float64 on the CPU.

    Raises:
        SourceError: the moment or the weight gradients are missing.
    """
    moment = required(statistics.moment, "zero-sum", "moments")
    gradient = required(statistics.weight_gradients, "zero-sum", "weight-gradients").mean
    u, v = truncate(weight, Metric(right=moment), min(weight.shape))  # u_i and u_iᵀ W
    return -((u.T @ gradient.double()) * v).sum(dim=1).cpu()


def held_out_energy(statistics: Statistics, factors: Factors) -> Tensor:
    """Return the held-out energy of each component, averaged over both halves.

    The losses over ranks are replaced by their lower convex hull, so that energies fall.

    Args:
        statistics: of both halves of the text.
        factors: decomposes the weight with the statistics of one half.

    Returns:
        Energies ``[p]``, falling, in float64 on the CPU.

    Raises:
        SourceError: the statistics of the halves are missing.
    """
    one, other = required(statistics.halves, "held-out", "gradients")
    curves = [
        held_out_losses(*factors(fitted), unseen) for fitted, unseen in ((one, other), (other, one))
    ]
    return _convex_steps(torch.stack(curves).mean(0).cpu())


def held_out_losses(u: Tensor, v: Tensor, unseen: Statistics) -> Tensor:
    """Return the loss of each rank from 0 to p in the metric of other text ``[p + 1]``, float64.

    Args:
        u: U ``[m, p]`` in float64.
        v: V ``[p, n]`` in float64; U V is the weight.
        unseen: moment and gradient of the other text.

    Raises:
        SourceError: the moment or the gradient is missing.
    """
    moment = required(unseen.moment, "held-out", "moments")
    gradient = required(unseen.gradient, "held-out", "gradients").moment
    left = _products(gradient, u.T, v.T, own="output")  # Uᵀ H U
    right = _products(moment, v, u, own="input")  # V G Vᵀ
    joint = left * right
    suffixes = joint.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
    return torch.cat([suffixes, suffixes.new_zeros(1)])


def _products(moment: Moment, rows: Tensor, other: Tensor, own: str) -> Tensor:
    """Return ``R A Rᵀ`` ``[p, p]``. If only X A Xᵀ is known, with X = ``other``·R, invert X."""
    matrix = moment.matrix.double()
    if moment.side == own:
        products: Tensor = rows @ matrix @ rows.T
        return products
    square = other.shape[0] == other.shape[1]
    inverse: Tensor = torch.linalg.inv(other) if square else torch.linalg.pinv(other)
    return inverse @ matrix @ inverse.T


def _convex_steps(losses: Tensor) -> Tensor:
    """Return the decrease per rank of the lower convex hull of ``losses``."""
    values = losses.tolist()
    corners = lower_hull(range(len(values)), values)
    steps: list[float] = []
    for start, end in pairwise(corners):
        steps += [(values[start] - values[end]) / (end - start)] * (end - start)
    steps += [0.0] * (len(values) - 1 - len(steps))
    return torch.tensor(steps, dtype=torch.float64)
