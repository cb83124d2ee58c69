"""Spectra of sublayers, and their rank measures.

Legend: W ``[m, n]``; a spectrum is the energies e = σ² ``[min(m, n)]``, falling, in float64. The
spectrum of a stack of experts, which have one rank, is the sum of their energies by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from hisvd_cli.modeling.layers.shapes import Shape, copies, matrix_of
from hisvd_cli.utils.errors import UsageError, suggest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The spectra of one sublayer, the input of an allocator.

    Attributes:
        name: full name of the sublayer in the model.
        cluster: its type; sublayers of one cluster share a stage-2 factor.
        shape: ``(m, n)``, or ``(E, m, n)`` for a stack of experts.
        energy: energies ``[min(m, n)]`` in the plan's metric, falling: the loss that each
            component adds when it is dropped (those of W without a calibration).
        weight_energy: energies of W, likewise; None if no method of the plan needs them.
        layer: index of the sublayer's block.
        importance: angular distance between the block's input and output, from 0 to 1; None
            without a calibration.
        changes: signed first-order change of the loss if each whitened component is dropped
            ``[min(m, n)]``, in order of falling whitened σ; None without weight gradients.
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
        """Energies of W. Raises LookupError if they were not computed."""
        if self.weight_energy is None:
            raise LookupError(f"The spectrum of the weight of {self.name} was not computed.")
        return self.weight_energy


def stable_rank(energy: Tensor, _shape: Shape) -> float:
    """Return Σσ²/σ₁² (Rudelson and Vershynin 2007)."""
    return float(energy.sum() / energy[0])


def effective_rank(energy: Tensor, _shape: Shape) -> float:
    """Return exp of the entropy of σ/Σσ (Roy and Vetterli 2007)."""
    import torch

    share = energy.sqrt() / energy.sqrt().sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def mathematical_rank(energy: Tensor, shape: Shape) -> float:
    """Return the number of σ above ``max(m, n)·eps·σ₁``, eps of float32."""
    import torch

    sigma = energy.sqrt()
    threshold = max(matrix_of(shape)) * torch.finfo(torch.float32).eps * sigma[0]
    return float((sigma > threshold).sum())


RANK_METHODS: dict[str, Callable[[Tensor, Shape], float]] = {
    "stable": stable_rank,
    "effective": effective_rank,
    "mathematical": mathematical_rank,
}


def rank_density(energy: Tensor, shape: Shape, method: str) -> float:
    """Return d = R / min(m, n), with rank measure R: ``stable``, ``effective`` or
    ``mathematical``. An all-zero matrix has density 0.

    Raises:
        UsageError: unknown rank measure.
    """
    if method not in RANK_METHODS:
        raise UsageError(f"No rank method '{method}'.", suggest(method, RANK_METHODS))
    if float(energy.sum()) == 0:
        return 0.0
    return RANK_METHODS[method](energy, shape) / min(matrix_of(shape))


def tail_share(energy: Tensor, rank: int) -> float:
    """Return Σ_{j>rank} e_j / Σ_j e_j, 0 for an all-zero spectrum."""
    total = float(energy.sum())
    return float(energy[rank:].sum()) / total if total else 0.0


def mean_over_matrices(values: Iterable[tuple[float, Shape]]) -> float:
    """Return the mean of one value per sublayer, in which every expert of a stack counts."""
    return fmean(value for value, shape in values for _ in range(copies(shape)))
