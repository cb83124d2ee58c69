"""Least-squares fits of weights to their inputs in the compressed model, without training.

A sublayer has the input x in the dense model and x′ in the compressed one. Its output should still
be the dense output W x:

- ``closed-form`` (SVD-LLM, arXiv 2403.07378): V is kept, and U is fitted to V x′:
  ``U = (W C Vᵀ + λ U₀)(V G′ Vᵀ + λI)⁻¹``, with U₀ of the decomposer.
- ``propagated``: W is fitted to x′ and then truncated: ``W* = W K``,
  ``K = (C + λI)(G′ + λI)⁻¹``. In a metric ``tr(H Δ G′ Δᵀ)``, the truncation of W* is the best pair
  for the dense outputs, as E‖W x − W′ x′‖²_H = tr(H (W* − W′) G′ (W* − W′)ᵀ) + const at λ = 0.

Both change nothing if λ is infinite or x′ = x.

Legend: W ``[m, n]``; C = E[x x′ᵀ], G′ = E[x′ x′ᵀ] ``[n, n]``; λ is relative to the mean diagonal of
the matrix that it is added to.
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
"""Candidate values of λ; the last one means no update."""


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
        device: device of the activations, and of the sums if it supports float64.
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
        """Add the sums of all processes on the first one."""
        for total in (self._cross, self._own, self._abs):
            add_up(total)
        self.tokens = add_up_count(self.tokens, add_up)

    def absorb(self, other: CrossSum) -> None:
        """Add another sum to this one."""
        self._cross += other._cross
        self._own += other._own
        self._abs += other._abs
        self.tokens += other.tokens

    def mean(self) -> CrossMoment:
        """Return the means over all tokens."""
        return CrossMoment(
            self._cross / self.tokens, self._own / self.tokens, self._abs / self.tokens
        )


def transfer(moments: CrossMoment, damping: float) -> Tensor:
    """Return K ``[n, n]`` such that ``W* = W K`` maps x′ to W x best; the identity for infinite
    damping.

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
    """Return the U ``[m, r]`` for which ``U V x′`` is closest to W x.

    Args:
        weight: W.
        pair: U₀ ``[m, r]`` and V ``[r, n]`` of the decomposer.
        moments: C and G′.
        damping: λ, at least 0; regularises towards U₀.

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
    if root is None:  # all inputs are zero
        return anchor
    found: Tensor = torch.cholesky_solve((target + level * anchor).T, root).T
    return found


def output_error(weight: Tensor, candidate: Tensor, moments: CrossMoment) -> float:
    """Return ``E‖W x − W′ x′‖²`` up to a constant, for W′ ``[m, n]``."""
    other = candidate.double()
    mapped = other @ moments.own - 2 * (weight.double() @ moments.cross)
    return float((mapped * other).sum())


def output_energy(weight: Tensor, moments: CrossMoment) -> float:
    """Return ``E‖W x′‖²``, to normalise the errors of several weights ``[m, n]``."""
    wide = weight.double()
    return float(((wide @ moments.own) * wide).sum()) or 1.0


def least(score: Callable[[float], float], values: Sequence[float]) -> float:
    """Return the value with the least score, and the largest of equal ones."""
    return min(sorted(values, reverse=True), key=score)


def updated_statistics(known: Statistics, transferred: Tensor, moments: CrossMoment) -> Statistics:
    """Return the statistics of W* = W K with input x′.

    The gradient at the output is that of the dense model. If it is stored on the input side, as
    Wᵀ H W, that of W* is Kᵀ (Wᵀ H W) K.

    Args:
        known: the statistics of W.
        transferred: K.
        moments: C and G′.
    """
    gradient = known.gradient
    if gradient is not None and gradient.moment.side == "input":
        wide = transferred.to(gradient.moment.matrix.device)
        moment = wide.T @ gradient.moment.matrix.double() @ wide
        gradient = Gradient(Moment(moment, "input"), gradient.mean_square)
    channels = Channels(moments.mean_abs, moments.own.diagonal())
    return replace(
        known,
        moment=Moment(moments.own, "input"),
        channels=channels,
        gradient=gradient,
        halves=None,
    )
