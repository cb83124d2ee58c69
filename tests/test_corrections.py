"""Corrections between stages, against plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hisvd_cli.compression.corrections import Correction, correction

Matrix = npt.NDArray[np.float64]
METHODS: tuple[Correction, ...] = (
    "pull-subspace",
    "project-to-delta",
    "alpha-blend",
    "gradient-step",
)


def drawn(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 7, generator=generator)


def corrected(method: Correction, delta: Tensor, gradients: list[Tensor]) -> Matrix:
    return wide(correction(method, delta, gradients, alpha=0.3, step=0.2))


def wide(tensor: Tensor) -> Matrix:
    found: Matrix = tensor.double().numpy()
    return found


def close(found: Matrix, expected: Matrix) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_formulas_hold_at_any_scale_of_the_gradient(scale: float) -> None:
    delta, gradient = drawn(0), drawn(1, scale)
    d, g = wide(delta), wide(gradient)
    close(corrected("pull-subspace", delta, [gradient]), (g * d).sum() / (g * g).sum() * g)
    close(corrected("project-to-delta", delta, [gradient]), (g * d).sum() / (d * d).sum() * d)
    close(corrected("alpha-blend", delta, []), 0.3 * d)
    close(corrected("gradient-step", delta, [gradient]), -0.2 * g)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_formulas_hold_at_any_scale_of_delta(scale: float) -> None:
    delta, gradient = drawn(0, scale), drawn(1)
    d, g = wide(delta), wide(gradient)
    close(corrected("pull-subspace", delta, [gradient]), (g * d).sum() / (g * g).sum() * g)
    # The larger Δ, the less of it is the part of the gradient along it: its length is the same.
    close(corrected("project-to-delta", delta, [gradient]), (g * d).sum() / (d * d).sum() * d)


def test_several_gradients_span_a_subspace() -> None:
    """Least squares finds the same point of it; so many as there are entries give all of Δ."""
    delta = drawn(0)
    gradients = [drawn(i + 1, 10.0**-i) for i in range(4)]
    basis = np.stack([wide(g).ravel() for g in gradients], axis=1)
    shares: Any = np.linalg.lstsq(basis / np.linalg.norm(basis, axis=0), wide(delta).ravel())[0]
    expected = (basis / np.linalg.norm(basis, axis=0) @ shares).reshape(5, 7)
    close(corrected("pull-subspace", delta, gradients), expected)
    everything = [drawn(i) for i in range(10, 50)]
    np.testing.assert_allclose(
        corrected("pull-subspace", delta, everything), wide(delta), atol=1e-4
    )


def test_gradients_that_repeat_span_no_more_than_one() -> None:
    delta, one = drawn(0), drawn(1)
    alone = corrected("pull-subspace", delta, [one])
    again = [one, 3.0 * one, torch.zeros_like(one), -one]
    np.testing.assert_allclose(corrected("pull-subspace", delta, again), alone, atol=1e-6)


@pytest.mark.parametrize("method", ["project-to-delta", "gradient-step"])
def test_others_take_the_mean_of_the_batches(method: Correction) -> None:
    delta, gradients = drawn(0), [drawn(1), drawn(2)]
    mean = (gradients[0] + gradients[1]) / 2
    close(corrected(method, delta, gradients), corrected(method, delta, [mean]))


def test_pulling_never_leads_away_from_the_teacher() -> None:
    for seed in range(20):
        delta, gradients = drawn(seed), [drawn(seed + 100), drawn(seed + 200)]
        left = wide(delta) - corrected("pull-subspace", delta, gradients)
        assert np.linalg.norm(left) <= np.linalg.norm(wide(delta))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_go_by_is_no_correction(method: Correction) -> None:
    zero, some = torch.zeros(5, 7), drawn(1)
    assert not corrected(method, zero, [zero, zero]).any()
    if method != "alpha-blend":
        assert not corrected(method, some, [zero]).any()
    if method != "gradient-step":
        assert not corrected(method, zero, [some]).any()
