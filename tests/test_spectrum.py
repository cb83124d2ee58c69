"""Rank measures against matrices whose measures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hisvd_cli.allocation.energies import weight_energy
from hisvd_cli.allocation.spectrum import rank_density, tail_share
from hisvd_cli.utils.errors import UsageError


def _energy(*sigma: float) -> torch.Tensor:
    return torch.tensor(sigma, dtype=torch.float64).square()


@pytest.mark.parametrize("method", ["stable", "effective", "mathematical"])
def test_equal_singular_values_have_full_density(method: str) -> None:
    assert rank_density(_energy(3, 3, 3, 3), (4, 9), method) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["stable", "effective", "mathematical"])
def test_a_rank_one_matrix_has_rank_one(method: str) -> None:
    assert rank_density(_energy(5, 0, 0, 0), (4, 9), method) == pytest.approx(0.25)


def test_stable_rank_is_the_ratio_of_norms() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = np.linalg.norm(weight.numpy(), "fro") ** 2 / np.linalg.norm(weight.numpy(), 2) ** 2
    assert rank_density(weight_energy(weight), (6, 10), "stable") * 6 == pytest.approx(norms)


def test_effective_rank_of_two_values() -> None:
    # Shares 3/4 and 1/4: exp(-(0.75 ln 0.75 + 0.25 ln 0.25)), worked by hand.
    expected = 4 / 3**0.75
    assert rank_density(_energy(3, 1), (2, 2), "effective") * 2 == pytest.approx(expected)
    assert expected == pytest.approx(math.exp(0.5623351446188083))


def test_mathematical_rank_is_torchs_matrix_rank() -> None:
    left = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    right = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    weight = left @ right
    assert rank_density(weight_energy(weight), (12, 20), "mathematical") * 12 == pytest.approx(
        float(torch.linalg.matrix_rank(weight))
    )


def test_an_all_zero_matrix_has_no_density() -> None:
    assert rank_density(_energy(0, 0), (2, 2), "effective") == 0.0
    assert tail_share(_energy(0, 0), 1) == 0.0


def test_tail_share_counts_energy() -> None:
    assert tail_share(_energy(2, 1, 1), 1) == pytest.approx(2 / 6)
    assert tail_share(_energy(2, 1, 1), 3) == 0.0


def test_unknown_method_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        rank_density(_energy(1, 1), (2, 2), "efective")
    assert "effective" in caught.value.hint
