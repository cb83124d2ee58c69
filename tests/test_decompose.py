"""The whitened decomposition against numpy's dense SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hisvd_cli.allocation.energies import weight_energy, whitened_energy
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.linalg.moments import Moment, MomentSum, Side
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.utils.errors import SourceError, UsageError

SHAPES = [(24, 40), (40, 24), (32, 32)]


def _sample(m: int, n: int, tokens: int, dead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W [m, n] and activations [tokens, n] of very uneven channels, some of them dead."""
    generator = torch.Generator().manual_seed(m * 1000 + n * 10 + tokens)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    scales = torch.logspace(1.5, -1.5, n, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * scales
    x[:, :dead] = 0
    return weight, x


def _moment(weight: torch.Tensor, x: torch.Tensor, side: Side) -> Moment:
    seen = x if side == "input" else x @ weight.T
    return Moment(seen.T @ seen / len(seen), side)


def _reference_energy(weight: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """Return σ² of W Xᵀ / √T by numpy, without ever forming a second moment."""
    sigma = np.linalg.svd(weight.numpy() @ x.numpy().T / np.sqrt(len(x)), compute_uv=False)
    return np.asarray(np.pad(sigma**2, (0, max(0, min(weight.shape) - len(sigma)))))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("tokens", "dead"), [(400, 0), (400, 7), (13, 0)])
def test_error_is_the_discarded_energy(
    shape: tuple[int, int], side: Side, tokens: int, dead: int
) -> None:
    # 13 tokens, or dead channels, make the moment singular.
    weight, x = _sample(*shape, tokens, dead)
    moment = _moment(weight, x, side)
    reference = _reference_energy(weight, x)
    energy = whitened_energy(weight, moment).numpy()
    np.testing.assert_allclose(energy, reference[: min(shape)], rtol=1e-6, atol=1e-9)
    for rank in (1, 5, 11, 23):
        u, v = DECOMPOSERS.get("whitened")(weight, Statistics(moment), rank)
        assert u.shape == (shape[0], rank)
        assert v.shape == (rank, shape[1])
        error = float(((weight - u @ v) @ x.T).square().sum() / len(x))
        assert error == pytest.approx(reference[rank:].sum(), rel=1e-4, abs=1e-9 * reference.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_give_the_same_matrix(shape: tuple[int, int]) -> None:
    weight, x = _sample(*shape, 500, 0)
    whitened = DECOMPOSERS.get("whitened")
    pairs = [
        whitened(weight, Statistics(_moment(weight, x, side)), 9) for side in ("input", "output")
    ]
    torch.testing.assert_close(pairs[0][0] @ pairs[0][1], pairs[1][0] @ pairs[1][1])


def test_full_rank_gives_the_matrix_back() -> None:
    weight, x = _sample(24, 40, 500, 0)
    u, v = DECOMPOSERS.get("whitened")(weight, Statistics(_moment(weight, x, "input")), 24)
    torch.testing.assert_close(u @ v, weight)


def test_weight_energy_is_numpys_svd() -> None:
    weight, _ = _sample(40, 24, 10, 0)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    np.testing.assert_allclose(weight_energy(weight).numpy(), sigma**2, rtol=1e-10)


def test_without_a_moment_it_says_what_to_run() -> None:
    with pytest.raises(SourceError, match="needs moments") as caught:
        DECOMPOSERS.get("whitened")(torch.eye(3), Statistics(), 1)
    assert caught.value.hint == "Run: hisvd calibrate"


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        DECOMPOSERS.get("whitend")
    assert "whitened" in caught.value.hint


def test_moment_sum_is_the_mean_outer_product() -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    total = MomentSum(5, torch.device("cpu"))
    total.add(x[:2])
    total.add(x[2])
    rows = x.numpy().reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(total.mean().numpy(), rows.T @ rows / len(rows), rtol=1e-6)
