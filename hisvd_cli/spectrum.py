"""Whitened spectra and the rank measures taken from them.

Legend: W ``[m, n]``; a spectrum is the energies e = σ² ``[min(m, n)]``, falling, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hisvd_cli.budget import Shape
from hisvd_cli.errors import UsageError, suggest
from hisvd_cli.moments import Moment


@dataclass(frozen=True)
class Spectrum:
    """What an allocator knows of one sublayer.

    Attributes:
        name: full name of the sublayer in the model.
        cluster: its type; sublayers of one cluster share a stage-2 factor.
        shape: ``(m, n)``.
        energy: whitened energies ``[min(m, n)]``, falling (those of W where nothing is calibrated).
        weight_energy: energies of W itself, likewise.
    """

    name: str
    cluster: str
    shape: Shape
    energy: Tensor
    weight_energy: Tensor


def whitened_energy(weight: Tensor, moment: Moment) -> Tensor:
    """Return σ² of ``W G^½``, the eigenvalues of ``W G Wᵀ``, on the smaller side.

    Σ_{j>k} of it is the mean squared output error of the best rank-k replacement of W.
    """
    m, n = weight.shape
    if m <= n or moment.side == "output":
        return _falling(moment.of_output(weight), min(m, n))
    half = weight.double() @ moment.root  # [m, n]
    return _falling(half.T @ half, n)


def weight_energy(weight: Tensor) -> Tensor:
    """Return σ² of W."""
    wide = weight.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    return _falling(wide @ wide.T, wide.shape[0])


def _falling(gram: Tensor, count: int) -> Tensor:
    values = torch.linalg.eigvalsh(gram)
    energy: Tensor = values.flip(0)[:count].clamp_min(0).cpu()
    return energy


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
