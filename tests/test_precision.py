"""Truncation in single precision: as good as in double, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hisvd_cli.linalg import precision
from hisvd_cli.linalg.eigen import Solver
from hisvd_cli.linalg.metric import Metric, triangular_root
from hisvd_cli.linalg.moments import Moment, Side
from hisvd_cli.linalg.precision import energies_in, truncate_in
from hisvd_cli.linalg.truncation import energies, truncate

SHAPES = [(48, 48), (40, 96), (96, 40)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def psd(size: int, seed: int, steepness: float = 0.7) -> Tensor:
    """Return a second moment ``[size, size]`` whose channels differ in size."""
    rows = draw(4 * size, size, seed=seed) * torch.logspace(0, -steepness, size)
    moment: Tensor = rows.T @ rows / len(rows)
    return moment


def moment_of(weight: Tensor, inputs: Tensor, side: Side) -> Moment:
    return Moment(inputs if side == "input" else weight @ inputs @ weight.T, side)


def loss_of(weight: Tensor, made: tuple[Tensor, Tensor], inputs: Tensor, outputs: Tensor) -> float:
    error = weight - made[0].double() @ made[1].double()
    return float((outputs @ error @ inputs @ error.T).trace())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small matrices take the way of large ones."""
    monkeypatch.setattr(precision, "LEAST_SIZE", 8)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
@pytest.mark.parametrize("with_left", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("solver", ["eigh", "partial", "subspace"])
def test_loss_is_that_of_double_precision(
    shape: tuple[int, int], share: float, with_left: bool, side: Side, solver: Solver
) -> None:
    (m, n), rank = shape, int(share * min(shape))
    if m > n and (with_left or side == "output"):
        pytest.skip("calibration keeps the other side")
    weight, inputs = draw(m, n, seed=1), psd(n, 2)
    outputs = psd(m, 3) + 0.1 * torch.eye(m) if with_left else torch.eye(m).double()
    left = triangular_root(outputs) if with_left else None
    metric = Metric(left, moment_of(weight, inputs, side))
    made = truncate_in(torch.float32, weight.float(), metric, rank, solver)
    assert made is not None
    assert made[0].dtype == made[1].dtype == torch.float32
    optimum = float(energies(weight, metric)[rank:].sum())
    assert loss_of(weight, made, inputs, outputs) == pytest.approx(optimum, rel=1e-3)
    if not with_left:
        gram = made[0].double().T @ made[0].double()
        torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("spread", [0.0, 1e9])
def test_either_way_to_the_right_factor_gives_the_rows_of_the_weight(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a triangular solve, and by a product where that might divide by next to nothing."""
    monkeypatch.setattr(precision, "_MOST_SPREAD", spread)
    weight, metric = draw(96, 40).float(), Metric(right=Moment(psd(40, 2), "input"))
    made = truncate_in(torch.float32, weight, metric, 15)
    assert made is not None
    torch.testing.assert_close(made[1], made[0].T @ weight, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
def test_what_rounding_would_spoil_is_left_to_double_precision(shape: tuple[int, int]) -> None:
    """One channel a million times as large as the others: their loss drowns in its rounding."""
    m, n = shape
    weight, inputs = draw(m, n, seed=1), psd(n, 2)
    inputs[0] *= 1e6
    inputs[:, 0] *= 1e6
    metric, rank = Metric(right=Moment(inputs, "input")), min(shape) // 2
    assert truncate_in(torch.float32, weight.float(), metric, rank) is None
    optimum = float(energies(weight, metric)[rank:].sum())
    made = truncate(weight, metric, rank)
    by_itself = truncate_in(torch.float64, weight, metric, rank)
    assert by_itself is not None  # and not the way of small matrices
    torch.testing.assert_close(made[0] @ made[1], by_itself[0] @ by_itself[1])
    # A loss taken as the trace of a product drowns too: without the large channel it does not.
    error = (weight - made[0] @ made[1])[:, 1:]
    rest = float((error @ inputs[1:, 1:] @ error.T).trace())
    assert rest == pytest.approx(optimum, rel=0.1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
def test_no_size_of_outliers_slips_through(shape: tuple[int, int]) -> None:
    """Four directions grow from none to where float32 sees nothing else."""
    m, n = shape
    weight, taken = draw(m, n, seed=1), 0
    for size in torch.logspace(-1, 4, 26).tolist():
        tall = size * draw(n, 4, seed=3)
        inputs = (psd(n, 2) + tall @ tall.T).float().double()
        metric = Metric(right=Moment(inputs, "input"))
        for rank in (min(m, n) // 4, min(m, n) // 2):
            made = truncate_in(torch.float32, weight.float(), metric, rank)
            if made is not None:
                optimum = float(energies(weight.float().double(), metric)[rank:].sum())
                lost = loss_of(weight.float().double(), made, inputs, torch.eye(m).double())
                assert lost <= 1.001 * optimum
                taken += 1
    assert 10 < taken < 40


@pytest.mark.usefixtures("small")
def test_what_has_no_loss_or_no_moment_is_left_to_double_precision() -> None:
    weight, moment = draw(24, 24), Moment(psd(24, 2), "input")
    assert truncate_in(torch.float32, weight, Metric(right=moment), 24) is None
    assert truncate_in(torch.float32, weight, Metric(torch.ones(24), moment), 5) is None
    zero = Moment(torch.zeros(24, 24), "input")
    for matrix in (weight, draw(40, 24)):
        assert truncate_in(torch.float32, matrix.float(), Metric(right=zero), 5) is None
        assert truncate_in(torch.float32, torch.zeros_like(matrix), Metric(right=moment), 5) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_left_to_double_precision(
    shape: tuple[int, int], value: float
) -> None:
    broken = psd(shape[1], 2)
    broken[3, 3] = value
    assert (
        truncate_in(torch.float32, draw(*shape), Metric(right=Moment(broken, "input")), 5) is None
    )


def test_large_matrices_take_single_precision_by_themselves() -> None:
    weight, inputs = draw(1024, 1024, seed=1), psd(1024, 2)
    metric, rank = Metric(right=Moment(inputs, "input")), 300
    made = truncate(weight, metric, rank)
    exact = torch.linalg.eigvalsh(weight @ inputs @ weight.T).flip(0)
    torch.testing.assert_close(
        energies(weight, metric), exact, rtol=1e-3, atol=1e-7 * float(exact.sum())
    )
    by_itself = truncate_in(torch.float32, weight.float(), metric, rank)
    assert by_itself is not None
    product = by_itself[0].double() @ by_itself[1].double()
    assert made[0].dtype == torch.float32
    torch.testing.assert_close(made[0].double() @ made[1].double(), product)
    loss = loss_of(weight, made, inputs, torch.eye(1024).double())
    assert loss == pytest.approx(float(exact[rank:].sum()), rel=1e-3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_alone_is_truncated_too(shape: tuple[int, int]) -> None:
    weight = draw(*shape, seed=1)
    made = truncate_in(torch.float32, weight, Metric(), 12)
    found = energies_in(torch.float32, weight, Metric())
    sigma = torch.linalg.svdvals(weight)
    assert found is not None
    torch.testing.assert_close(found, sigma**2, rtol=1e-4, atol=1e-4)
    assert made is not None
    lost = loss_of(weight, made, torch.eye(shape[1]).double(), torch.eye(shape[0]).double())
    assert lost == pytest.approx(float((sigma[12:] ** 2).sum()), rel=1e-3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_those_of_double_precision_or_refused(shape: tuple[int, int]) -> None:
    m, n = shape
    weight, inputs = draw(m, n, seed=1), psd(n, 2)
    exact = torch.linalg.eigvalsh(weight @ inputs @ weight.T).flip(0)[: min(m, n)]
    found = energies_in(torch.float32, weight.float(), Metric(right=Moment(inputs, "input")))
    assert found is not None
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * float(exact[0]))
    inputs[0] *= 1e6
    inputs[:, 0] *= 1e6
    assert energies_in(torch.float32, weight.float(), Metric(right=Moment(inputs, "input"))) is None


@pytest.mark.usefixtures("small")
def test_a_tall_weight_of_wide_range_keeps_orthonormal_outputs() -> None:
    """Rounding tilts the outputs of the smallest components, which are then made straight."""
    weight, inputs = draw(96, 40, seed=1), psd(40, 2)
    weight = weight * torch.logspace(0, -3.4, 40)
    made = truncate_in(torch.float32, weight.float(), Metric(right=Moment(inputs, "input")), 8)
    assert made is not None
    gram = made[0].double().T @ made[0].double()
    torch.testing.assert_close(gram, torch.eye(8).double(), rtol=0, atol=2e-3)
