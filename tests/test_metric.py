"""The K-FAC metric from either side's moments, and what it says of moments that cannot be used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hisvd_cli.linalg.metric import Metric, diagonal_root, fisher_metric, triangular_root
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Channels, Gradient, Statistics
from hisvd_cli.utils.errors import NumericalError, SourceError

SHRINKAGE = (0.1, 0.3)


def second(rows: int, width: int, seed: int) -> Tensor:
    draws = torch.randn(
        rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return draws.T @ draws / rows


WEIGHT = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
G, H = second(50, 4, 1), second(50, 5, 2)
CHANNELS = Channels(G.diagonal().sqrt(), G.diagonal())
MEAN = float(H.diagonal().mean())
DIRECT = Statistics(Moment(G, "input"), None, Gradient(Moment(H, "output"), MEAN))


def shrunk_by_hand(matrix: Tensor, shrinkage: float) -> Tensor:
    mean = matrix.diagonal().mean()
    return (1 - shrinkage) * matrix + shrinkage * mean * torch.eye(len(matrix), dtype=matrix.dtype)


def loss(error: Tensor) -> Tensor:
    """Return tr(H Δ G Δᵀ) with both moments shrunk, written out."""
    g, h = shrunk_by_hand(G, SHRINKAGE[0]), shrunk_by_hand(H, SHRINKAGE[1])
    return (h @ error @ g @ error.T).trace()


@pytest.mark.parametrize(
    "statistics",
    [
        DIRECT,
        replace(DIRECT, moment=Moment(WEIGHT @ G @ WEIGHT.T, "output"), channels=CHANNELS),
        replace(DIRECT, gradient=Gradient(Moment(WEIGHT.T @ H @ WEIGHT, "input"), MEAN)),
    ],
    ids=["both known", "moment of the output", "gradient at the input"],
)
def test_the_loss_of_the_weight_is_the_same_from_either_side(statistics: Statistics) -> None:
    metric = fisher_metric(WEIGHT, statistics, *SHRINKAGE)
    weight = WEIGHT.T if metric.transposed else WEIGHT
    assert metric.gram(metric.weigh(weight)).trace() == pytest.approx(float(loss(WEIGHT)))


def test_moments_of_the_far_sides_alone_are_refused() -> None:
    statistics = Statistics(
        Moment(WEIGHT @ G @ WEIGHT.T, "output"),
        CHANNELS,
        Gradient(Moment(WEIGHT.T @ H @ WEIGHT, "input"), MEAN),
    )
    with pytest.raises(SourceError, match=r"\[5, 4\].*fisher.*own side") as caught:
        fisher_metric(WEIGHT, statistics, *SHRINKAGE)
    assert caught.value.hint == "Calibrate again."


@pytest.mark.parametrize(
    ("statistics", "lacks"),
    [
        (replace(DIRECT, moment=None), "moments"),
        (replace(DIRECT, gradient=None), "gradients"),
        (replace(DIRECT, moment=Moment(H, "output")), "moments"),  # and no channels
    ],
)
def test_a_missing_statistic_is_named(statistics: Statistics, lacks: str) -> None:
    with pytest.raises(SourceError, match=f"'fisher' needs {lacks}") as caught:
        fisher_metric(WEIGHT, statistics, *SHRINKAGE)
    assert caught.value.hint.startswith("Run: hisvd calibrate")


def test_the_root_of_a_nearly_semidefinite_matrix_is_damped() -> None:
    values = torch.tensor([3.0, 1.0, -1e-9], dtype=torch.float64)
    q = torch.linalg.qr(second(9, 3, 4))[0]
    matrix = q @ values.diag() @ q.T
    root = triangular_root(matrix)
    assert root is not None
    assert torch.equal(root, root.tril())
    assert torch.allclose(root @ root.T, matrix, atol=1e-6)


def test_what_has_no_root() -> None:
    assert triangular_root(torch.zeros(3, 3, dtype=torch.float64)) is None
    assert diagonal_root(torch.zeros(3)) is None
    with pytest.raises(NumericalError, match=r"\[3, 3\] is not positive") as caught:
        triangular_root(-torch.eye(3, dtype=torch.float64))
    assert caught.value.hint == "Calibrate again."
    broken = torch.full((2, 2), torch.nan, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"\[2, 2\] is not finite") as caught:
        triangular_root(broken)
    assert "`model.dtype` float32" in caught.value.hint


def test_a_zero_moment_weighs_to_zero() -> None:
    metric = Metric(right=Moment(torch.zeros(4, 4), "input"))
    assert torch.equal(metric.whitened(WEIGHT), torch.zeros_like(WEIGHT))


def test_only_taller_weights_have_a_smaller_gram() -> None:
    metric = Metric(right=Moment(G, "input"))
    assert metric.narrows(WEIGHT)
    assert not metric.narrows(WEIGHT[:4])
    assert not Metric(right=Moment(H, "output")).narrows(WEIGHT)
