"""Weights that answer for what the compression before them did to their inputs, without training.

A sublayer of the compressed model is given x′ where the dense one is given x. What it should return
is still the dense output W x, so W is fitted to that by least squares:

- ``closed-form`` (SVD-LLM, arXiv 2403.07378): V of the pair stays, and U is fitted to V x′:
  ``U = (W C Vᵀ + λ U₀)(V G′ Vᵀ + λI)⁻¹``, U₀ the decomposer's.
- ``propagated``: W is fitted to x′ and then truncated: ``W* = W K``,
  ``K = (C + λI)(G′ + λI)⁻¹``. In a metric ``tr(H Δ G′ Δᵀ)`` the truncation of W* is the best pair
  for the dense outputs, as E‖W x − W′ x′‖²_H = tr(H (W* − W′) G′ (W* − W′)ᵀ) + const at λ = 0.

Both leave everything as it is where λ is infinite, and where x′ = x.

Legend: W ``[m, n]``; C = E[x x′ᵀ], G′ = E[x′ x′ᵀ] ``[n, n]``; λ is given relative to the mean of
the diagonal of what it is added to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hisvd_cli.linalg.metric import triangular_root
from hisvd_cli.linalg.moments import AddUp, Moment, add_up_count, exact_device
from hisvd_cli.linalg.products import gram
from hisvd_cli.linalg.statistics import Channels, Gradient, Statistics

DAMPINGS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, math.inf)
"""Values of λ that are tried where none is given; the last one updates nothing."""


@dataclass(frozen=True)
class CrossMoment:
    """Means over tokens: C and G′ ``[n, n]``, and E|x′| ``[n]``, in float64."""

    cross: Tensor
    own: Tensor
    mean_abs: Tensor


class CrossSum:
    """Running Σ x x′ᵀ, Σ x′ x′ᵀ and Σ |x′|: products in float32, their sums in float64.

    Args:
        width: n.
        device: where activations come from; the sums stay there if it has float64.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        home = exact_device(device)
        self._cross = torch.zeros(width, width, dtype=torch.float64, device=home)
        self._own = torch.zeros_like(self._cross)
        self._abs = torch.zeros(width, dtype=torch.float64, device=home)
        self.tokens = 0

    def add(self, x: Tensor, other: Tensor) -> None:
        """Add x and x′ of the same tokens, both ``[..., n]``."""
        dense = x.reshape(-1, x.shape[-1]).float()
        rows = other.reshape(-1, x.shape[-1]).float()
        self._cross += (dense.T @ rows).to(self._cross.device)
        self._own += gram(rows.T).to(self._own.device)
        self._abs += rows.abs().sum(0).to(self._abs.device)
        self.tokens += len(rows)

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        for total in (self._cross, self._own, self._abs):
            add_up(total)
        self.tokens = add_up_count(self.tokens, add_up)

    def absorb(self, other: CrossSum) -> None:
        """Add what another sum has seen."""
        self._cross += other._cross
        self._own += other._own
        self._abs += other._abs
        self.tokens += other.tokens

    def mean(self) -> CrossMoment:
        """Return the means over all tokens so far."""
        return CrossMoment(
            self._cross / self.tokens, self._own / self.tokens, self._abs / self.tokens
        )


def transfer(moments: CrossMoment, damping: float) -> Tensor:
    """Return K ``[n, n]``, with which ``W* = W K`` maps x′ to W x best; the identity for an
    infinite damping.

    Args:
        moments: C and G′.
        damping: λ, at least 0. A singular G′ is damped by at least 1e-12.

    Raises:
        NumericalError: G′ is not finite, or far from positive semidefinite.
    """
    return _ridge(moments.cross, moments.own, damping, torch.eye(len(moments.own)))


def refitted(
    weight: Tensor, pair: tuple[Tensor, Tensor], moments: CrossMoment, damping: float
) -> Tensor:
    """Return the U ``[m, r]`` with which ``U V x′`` comes nearest to W x.

    Args:
        weight: W.
        pair: U₀ ``[m, r]`` and V ``[r, n]`` of the decomposer.
        moments: C and G′.
        damping: λ, at least 0; it pulls towards U₀.

    Raises:
        NumericalError: see :func:`transfer`.
    """
    u, v = pair[0].double(), pair[1].double()
    target = weight.double() @ moments.cross @ v.T
    return _ridge(target, v @ moments.own @ v.T, damping, u)


def _ridge(target: Tensor, square: Tensor, damping: float, start: Tensor) -> Tensor:
    """Return ``(T + λ S)(A + λI)⁻¹``: the minimum of ``tr(X A Xᵀ) − 2 tr(T Xᵀ) + λ‖X − S‖²``."""
    anchor = start.to(square)
    if math.isinf(damping):
        return anchor
    level = damping * square.diagonal().mean()
    damped = square.clone()
    damped.diagonal().add_(level)
    root = triangular_root(damped)
    if root is None:  # nothing ever came in
        return anchor
    found: Tensor = torch.cholesky_solve((target + level * anchor).T, root).T
    return found


def output_error(weight: Tensor, candidate: Tensor, moments: CrossMoment) -> float:
    """Return ``E‖W x − W′ x′‖²`` up to what is the same for every W′ ``[m, n]``."""
    other = candidate.double()
    mapped = other @ moments.own - 2 * (weight.double() @ moments.cross)
    return float((mapped * other).sum())


def output_energy(weight: Tensor, moments: CrossMoment) -> float:
    """Return ``E‖W x′‖²``, by which errors of several weights ``[m, n]`` can be compared."""
    wide = weight.double()
    return float(((wide @ moments.own) * wide).sum()) or 1.0


def least(score: Callable[[float], float], values: Sequence[float]) -> float:
    """Return the value with the least score, of equal ones the largest."""
    return min(sorted(values, reverse=True), key=score)


def carried(known: Statistics, transferred: Tensor, moments: CrossMoment) -> Statistics:
    """Return what a decomposer is to know of W* = W K, whose input is x′.

    The gradient at the output is that of the dense model; where it is known at the input, as
    Wᵀ H W, that of W* is Kᵀ (Wᵀ H W) K.

    Args:
        known: what the calibration knows of W.
        transferred: K.
        moments: C and G′.
    """
    gradient = known.gradient
    if gradient is not None and gradient.moment.side == "input":
        wide = transferred.to(gradient.moment.matrix.device)
        felt = wide.T @ gradient.moment.matrix.double() @ wide
        gradient = Gradient(Moment(felt, "input"), gradient.mean_square)
    channels = Channels(moments.mean_abs, moments.own.diagonal())
    return replace(
        known,
        moment=Moment(moments.own, "input"),
        channels=channels,
        gradient=gradient,
        halves=None,
    )
