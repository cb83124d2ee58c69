"""The steps of the learned allocator, against those of torch's optimizer and autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hisvd_cli.allocation.budget import break_even
from hisvd_cli.allocation.methods import ALLOCATORS, Spectrum
from hisvd_cli.modeling.layers.lowrank import LAYERS, Storage
from tests.allocation import allocate, make_budget
from tests.test_measuring_allocators import FakeProbe

SHAPES: list[tuple[int, int]] = [(96, 96), (64, 96), (192, 96), (96, 192)]
RATE = 0.01
STEPS = 6


class RecordingProbe(FakeProbe):
    """Keeps what it is asked."""

    def __init__(self, spectra: Sequence[Spectrum], weights: Sequence[float]) -> None:
        super().__init__(spectra, weights)
        self.positions: list[list[float]] = []
        self.others: list[tuple[float, int]] = []

    def soft_divergence(
        self, positions: Sequence[float], width: float, step: int
    ) -> tuple[float, list[float]]:
        self.positions.append(list(positions))
        self.others.append((width, step))
        return super().soft_divergence(positions, width, step)


def _spectra(flat: bool) -> list[Spectrum]:
    """Return layers of exponential spectra; with ``flat``, that of the first is constant."""
    found = []
    for i, shape in enumerate(SHAPES):
        decay = 0.0 if flat and i == 0 else 0.05
        energy = 100 * torch.exp(-decay * torch.arange(min(shape), dtype=torch.float64))
        found.append(Spectrum(str(i), "q", shape, energy, None))
    return found


def _position(share: Tensor, shape: tuple[int, int], storage: Storage) -> Tensor:
    """Return the rank r that costs a share of mn: r(m+n), or r(m+n−r) + m."""
    m, n = shape
    if storage == "pair":
        return share * m * n / (m + n)
    return ((m + n) - ((m + n) ** 2 - 4 * (share * m * n - m)).sqrt()) / 2


def _projected(shares: Tensor, sizes: Tensor, parameters: int) -> Tensor:
    """Return the nearest shares of at most 1 that cost ``parameters``.

    They are ``min(x − t·size, 1)``: with the dense ones known, t follows from the rest.
    """
    dense = torch.zeros(len(shares), dtype=torch.bool)
    while True:
        free = sizes * ~dense
        excess = (free * shares).sum() + sizes[dense].sum() - parameters
        moved = torch.where(dense, 1.0, shares - excess * sizes / (free @ free))
        if moved.max() <= 1:
            return moved
        dense |= moved > 1


def _by_torch(
    shares: Tensor, probe: FakeProbe, parameters: int, storage: Storage
) -> tuple[list[list[float]], Tensor]:
    """Return the positions before each step, and the shares after the last."""
    sizes = torch.tensor([m * n for m, n in SHAPES], dtype=torch.float64)
    leaves = [share.clone().requires_grad_() for share in shares]
    groups = [
        {"params": [leaf], "lr": RATE * min(shape) / break_even(shape)}
        for leaf, shape in zip(leaves, SHAPES, strict=True)
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)
    asked = []
    for step in range(STEPS):
        open_ = torch.tensor([leaf.item() < 1 for leaf in leaves])
        places = [_position(x, s, storage) for x, s in zip(leaves, SHAPES, strict=True)]
        ranks = torch.where(open_, torch.stack(places), torch.inf)
        asked.append(ranks.tolist())
        adam.zero_grad()
        ranks.backward(torch.tensor(probe.soft_divergence(ranks.tolist(), 0.0, step)[1]).double())
        slopes = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
        free = sizes * open_
        along = open_ * (slopes - sizes * (slopes @ free) / (free @ free))
        for leaf, slope in zip(leaves, along, strict=True):
            leaf.grad = slope
        adam.step()
        with torch.no_grad():
            moved = _projected(torch.stack(leaves), sizes, parameters)
            for leaf, share in zip(leaves, moved, strict=True):
                leaf.copy_(share)
    return asked, torch.stack(leaves).detach()


@pytest.mark.parametrize("start", ["uniform", "waterfill"])
@pytest.mark.parametrize("storage", LAYERS)
def test_steps_are_those_of_adam_projected_to_the_budget(start: str, storage: Storage) -> None:
    """Waterfill starts with the layer of the constant spectrum dense."""
    spectra = _spectra(flat=start == "waterfill")
    budget = make_budget(spectra, 0.6, storage=storage)
    probe = RecordingProbe(spectra, [1.0, 1.5, 0.7, 2.0])
    options = {"learning_steps": STEPS, "learning_rate": RATE, "softness": 0.03}
    allocation = allocate("learned", spectra, budget, probe=probe, learning_start=start, **options)

    assert allocation.baselines == ALLOCATORS.get(start)(spectra, budget).ranks
    assert (allocation.baselines[0] == 96) == (start == "waterfill")
    shares = torch.tensor(budget.shares(allocation.baselines), dtype=torch.float64)
    asked, last = _by_torch(
        shares, FakeProbe(spectra, [1.0, 1.5, 0.7, 2.0]), budget.parameters, storage
    )
    assert last.min() > 0.1  # no layer is at its floor
    assert probe.others == [(0.03, step) for step in range(STEPS)]
    for positions, expected in zip(probe.positions, asked, strict=True):
        assert positions == pytest.approx(expected, rel=1e-6)
    real = [float(x) * break_even(s) for x, s in zip(last, SHAPES, strict=True)]
    assert allocation.ranks == budget.rounded(real, [s.energy for s in spectra], nearest=True)
