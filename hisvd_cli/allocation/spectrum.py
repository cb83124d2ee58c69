"""Whitened spectra and the rank measures taken from them.

Legend: W ``[m, n]``; a spectrum is the energies e = σ² ``[min(m, n)]``, falling, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.allocation.held_out import held_out_energy
from hisvd_cli.linalg.metric import Metric, fisher_metric
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Statistics, required
from hisvd_cli.linalg.truncation import energies, truncate
from hisvd_cli.modeling.sublayers import Shape
from hisvd_cli.utils.errors import UsageError, suggest


@dataclass(frozen=True)
class Spectrum:
    """What an allocator knows of one sublayer.

    Attributes:
        name: full name of the sublayer in the model.
        cluster: its type; sublayers of one cluster share a stage-2 factor.
        shape: ``(m, n)``.
        energy: energies ``[min(m, n)]`` in the plan's metric, falling: what each component adds
            to the loss when it is dropped (those of W where nothing is calibrated).
        weight_energy: energies of W itself, likewise; None where no method of the plan asked for
            them.
        layer: index of the sublayer's block.
        importance: angular distance of the block's input and output, from 0 to 1; None where
            nothing is calibrated.
        changes: signed first-order change of the loss by dropping each whitened component
            ``[min(m, n)]``, in the order of falling whitened σ; None without weight gradients.
    """

    name: str
    cluster: str
    shape: Shape
    energy: Tensor
    weight_energy: Tensor | None
    layer: int = 0
    importance: float | None = None
    changes: Tensor | None = None

    @property
    def of_weight(self) -> Tensor:
        """Energies of W itself. Raises LookupError where they were not asked for."""
        if self.weight_energy is None:
            raise LookupError(f"The spectrum of the weight of {self.name} was not asked for.")
        return self.weight_energy


def whitened_energy(weight: Tensor, moment: Moment) -> Tensor:
    """Return σ² of ``W G^½``, the eigenvalues of ``W G Wᵀ``, on the smaller side.

    Σ_{j>k} of it is the mean squared output error of the best rank-k replacement of W.
    """
    return energies(weight, Metric(right=moment))


def weight_energy(weight: Tensor) -> Tensor:
    """Return σ² of W."""
    return energies(weight, Metric())


def fisher_energy(
    weight: Tensor, statistics: Statistics, input_shrinkage: float, output_shrinkage: float
) -> Tensor:
    """Return the energies of the K-FAC metric, σ² of ``L_Hᵀ W L_G`` ``[min(m, n)]``.

    Σ_{j>k} of it is ``tr(H Δ G Δᵀ)``, H and G shrunk, of the best rank-k replacement; all zero
    where the loss does not depend on the sublayer (H = 0).

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
    """Return what components of the K-FAC metric lose on the half of the text that they were not
    chosen on ``[min(m, n)]``; see :mod:`hisvd_cli.allocation.held_out`.

    Args:
        weight: W ``[m, n]``.
        statistics: in halves; otherwise as for :func:`fisher_energy`.
        input_shrinkage: s of G, from 0 to 1.
        output_shrinkage: s of H.
    """

    def factors(half: Statistics) -> tuple[Tensor, Tensor]:
        metric = fisher_metric(weight, half, input_shrinkage, output_shrinkage)
        return truncate(weight, metric, min(weight.shape))

    return held_out_energy(statistics, factors)


def component_changes(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return the first-order change of the loss by dropping each whitened component (ZS-SVD).

    With ``W S = Σ σ_i u_i v_iᵀ``, S Sᵀ = G, it is ``δ_i = −σ_i·u_iᵀ(∂L/∂W·S⁻ᵀ)v_i``. As
    ``σ_i u_i v_iᵀ S⁻¹ = u_i u_iᵀ W``, that is ``−⟨∂L/∂W, u_i u_iᵀ W⟩``: no inverse, any root.

    Args:
        weight: W ``[m, n]``.
        statistics: its moment and weight gradients; ∂L/∂W is their mean.

    Returns:
        δ ``[min(m, n)]`` in the order of falling σ, in float64 on the CPU.

    Raises:
        SourceError: without a moment or weight gradients.
    """
    moment = required(statistics.moment, "zero-sum", "moments")
    gradient = required(statistics.weight_gradients, "zero-sum", "weight-gradients").mean
    u, v = truncate(weight, Metric(right=moment), min(weight.shape))  # u_i and u_iᵀ W
    return -((u.T @ gradient.double()) * v).sum(dim=1).cpu()


def stable_rank(energy: Tensor, _shape: Shape) -> float:
    """Return Σσ²/σ₁² (Rudelson and Vershynin 2007)."""
    return float(energy.sum() / energy[0])


def effective_rank(energy: Tensor, _shape: Shape) -> float:
    """Return exp of the entropy of σ/Σσ (Roy and Vetterli 2007)."""
    share = energy.sqrt() / energy.sqrt().sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def mathematical_rank(energy: Tensor, shape: Shape) -> float:
    """Return the number of σ above ``max(m, n)·eps·σ₁``, eps of float32."""
    sigma = energy.sqrt()
    threshold = max(shape) * torch.finfo(torch.float32).eps * sigma[0]
    return float((sigma > threshold).sum())


RANK_METHODS: dict[str, Callable[[Tensor, Shape], float]] = {
    "stable": stable_rank,
    "effective": effective_rank,
    "mathematical": mathematical_rank,
}


def rank_density(energy: Tensor, shape: Shape, method: str) -> float:
    """Return d = R / min(m, n) for one of ``stable``, ``effective``, ``mathematical``.

    An all-zero matrix has density 0.

    Raises:
        UsageError: unknown method.
    """
    if method not in RANK_METHODS:
        raise UsageError(f"No rank method '{method}'.", suggest(method, RANK_METHODS))
    if float(energy.sum()) == 0:
        return 0.0
    return RANK_METHODS[method](energy, shape) / min(shape)


def tail_share(energy: Tensor, rank: int) -> float:
    """Return Σ_{j>rank} e_j / Σ_j e_j, 0 for an all-zero spectrum."""
    total = float(energy.sum())
    return float(energy[rank:].sum()) / total if total else 0.0
