"""Held-out losses against truncations made and measured by numpy on separate tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hisvd_cli.allocation.energies import held_out_energy, held_out_fisher_energy, held_out_losses
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Channels, Gradient, Statistics
from hisvd_cli.utils.errors import SourceError

SHAPES = [(20, 34), (34, 20), (26, 26)]
SHRINKAGE = {"input_shrinkage": 0.05, "output_shrinkage": 0.2}


def _tokens(width: int, seed: int, count: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -1, width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales


def _half(weight: Tensor, seed: int, natural: bool) -> tuple[Statistics, Tensor, Tensor]:
    """Return statistics of some tokens, on the smaller sides as calibration keeps them or on the
    plain ones, with the tokens and the gradients themselves."""
    m, n = weight.shape
    x, g = _tokens(n, seed), _tokens(m, seed + 1000)
    moment, gradient = Moment(x.T @ x / len(x), "input"), Moment(g.T @ g / len(g), "output")
    if natural and m < n:
        y = x @ weight.T
        moment = Moment(y.T @ y / len(y), "output")
    if natural and m > n:
        felt = g @ weight
        gradient = Moment(felt.T @ felt / len(felt), "input")
    channels = Channels(x.abs().mean(0), x.square().mean(0))
    return Statistics(moment, channels, Gradient(gradient, float(g.square().mean()))), x, g


@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_are_those_of_each_rank_on_the_other_tokens(
    shape: tuple[int, int], natural: bool
) -> None:
    weight = _tokens(shape[1], 7, shape[0])
    fitted, _, _ = _half(weight, 1, natural)
    unseen, x, g = _half(weight, 2, natural)
    fisher = DECOMPOSERS.get("fisher")
    u, v = fisher(weight, fitted, min(shape), **SHRINKAGE)
    losses = held_out_losses(u, v, unseen).numpy()
    assert losses.shape == (min(shape) + 1,)
    for rank in (0, 1, 7, min(shape) - 1, min(shape)):
        error = (weight - u[:, :rank] @ v[:rank]).numpy()
        h, moment = (g.T @ g / len(g)).numpy(), (x.T @ x / len(x)).numpy()
        expected = np.trace(h @ error @ moment @ error.T)
        assert losses[rank] == pytest.approx(expected, rel=1e-6, abs=1e-9 * losses[0])


def test_energies_are_the_convex_curve_below_the_mean_loss() -> None:
    weight = _tokens(34, 7, 20)
    one, other = _half(weight, 1, True)[0], _half(weight, 2, True)[0]
    whole = replace(one, halves=(one, other))
    fisher = DECOMPOSERS.get("fisher")
    curves = [
        held_out_losses(*fisher(weight, a, 20, **SHRINKAGE), b).numpy()
        for a, b in ((one, other), (other, one))
    ]
    mean = np.mean(curves, axis=0)
    energy = held_out_fisher_energy(weight, whole, 0.05, 0.2).numpy()
    assert (np.diff(energy) <= 1e-12 * energy[0]).all()
    curve = np.append(energy[::-1].cumsum()[::-1], 0.0)
    assert (curve <= mean + 1e-9 * mean[0]).all()
    # The largest such curve: through the line between any two points it does not pass below both.
    ranks = np.arange(len(mean))
    for rank in ranks:
        least = min(
            np.interp(rank, [a, b], [mean[a], mean[b]])
            for a in ranks[: rank + 1]
            for b in ranks[rank:]
            if a < b
        )
        assert curve[rank] == pytest.approx(least, rel=1e-9, abs=1e-9 * mean[0])


def test_what_one_half_never_shows_counts() -> None:
    """Directions that only the other half's gradient has are lost unseen: the energies say so."""
    weight = _tokens(26, 7, 26)
    same, _, _ = _half(weight, 1, False)
    other, _, _ = _half(weight, 2, False)
    assert other.gradient is not None
    turned = Moment(other.gradient.moment.matrix.flip(0, 1), "output")
    strange = replace(other, gradient=Gradient(turned, other.gradient.mean_square))

    def lost(halves: tuple[Statistics, Statistics]) -> float:
        statistics = replace(same, halves=halves)
        return float(held_out_fisher_energy(weight, statistics, 0.05, 0.2)[10:].sum())

    assert lost((same, strange)) > 3 * lost((same, other))


def test_without_halves_it_names_the_command() -> None:
    with pytest.raises(SourceError, match="'held-out' needs gradients"):
        held_out_energy(Statistics(), lambda _half: (torch.eye(2), torch.eye(2)))
