"""Every decomposer against numpy: Cholesky factors, dense SVDs and explicit inverses in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hisvd_cli.allocation.energies import component_changes, fisher_energy
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.compression.methods.gfwsvd import DAMPING
from hisvd_cli.linalg.eigen import leading
from hisvd_cli.linalg.metric import fisher_metric
from hisvd_cli.linalg.moments import Moment, Side
from hisvd_cli.linalg.statistics import Channels, Gradient, Statistics, WeightGradients
from hisvd_cli.linalg.truncation import decomposing, truncate
from hisvd_cli.utils.errors import NumericalError, SourceError

Matrix = np.ndarray[Any, np.dtype[np.float64]]

SHAPES = [(20, 34), (34, 20), (26, 26)]
SEQUENCES, LENGTH = 12, 50
Sides = tuple[Side, Side]
SIDES: list[Sides] = [("input", "output"), ("output", "output"), ("input", "input")]
"""On which side of W the moment is known, and that of the gradient."""
KNOBS: dict[str, dict[str, float]] = {
    "svd": {},
    "asvd": {"asvd_alpha": 0.5},
    "whitened": {},
    "fwsvd": {},
    "gfwsvd": {},
    "fisher": {"input_shrinkage": 0.02, "output_shrinkage": 0.1},
}
RANDOM = {"asvd_alpha": 0.5, "input_shrinkage": 0.02, "output_shrinkage": 0.1, "seed": 3}


@dataclass(frozen=True)
class Case:
    """A sublayer, and the tokens that its statistics are taken from."""

    weight: Tensor  # [m, n]
    x: Tensor  # [sequences, length, n]
    g: Tensor  # [sequences, length, m]

    def statistics(self, sides: Sides = SIDES[0]) -> Statistics:
        rows, grads = self.x.flatten(0, 1), self.g.flatten(0, 1)
        seen = rows if sides[0] == "input" else rows @ self.weight.T
        felt = grads if sides[1] == "output" else grads @ self.weight
        each = self.g.mT @ self.x  # D of each sequence, [sequences, m, n]
        return Statistics(
            Moment(_second(seen), sides[0]),
            Channels(rows.abs().mean(0), rows.square().mean(0)),
            Gradient(Moment(_second(felt), sides[1]), float(grads.square().mean())),
            WeightGradients(each.mean(0), (each @ each.mT).mean(0), (each.mT @ each).mean(0)),
        )

    def sides(self, method: str) -> tuple[Matrix, Matrix]:
        """Return H and G of a method, worked out from the tokens by numpy."""
        m, n = self.weight.shape
        x, g = self.x.flatten(0, 1).numpy(), self.g.flatten(0, 1).numpy()
        each = np.stack([b.T @ a for a, b in zip(self.x.numpy(), self.g.numpy(), strict=True)])
        no_h, no_g = np.eye(m), np.eye(n)
        inputs, outputs = x.T @ x / len(x), g.T @ g / len(g)
        if method == "asvd":
            return no_h, np.diag(np.abs(x).mean(0))  # (mean^0.5)²
        if method == "whitened":
            return no_h, inputs
        if method == "fwsvd":
            return np.diag((each**2).mean(0).sum(1)), no_g
        if method == "gfwsvd":
            left = np.mean([d @ d.T for d in each], axis=0)
            left += DAMPING * np.trace(left) / m * no_h
            return left, np.mean([d.T @ d for d in each], axis=0)
        if method == "fisher":
            return (
                0.9 * outputs + 0.1 * np.trace(outputs) / m * no_h,
                0.98 * inputs + 0.02 * np.trace(inputs) / n * no_g,
            )
        return no_h, no_g


def _second(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def _gradient(matrix: Tensor) -> Gradient:
    return Gradient(Moment(matrix, "output"), float(matrix.diagonal().mean()))


def _case(shape: tuple[int, int], scale: float = 1e-3) -> Case:
    """Return a case of uneven, correlated channels; gradients are small, as real ones are."""
    m, n = shape
    generator = torch.Generator().manual_seed(1000 * m + n)

    def tokens(width: int) -> Tensor:
        mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
        draw = torch.randn(SEQUENCES, LENGTH, width, generator=generator, dtype=torch.float64)
        return draw * torch.logspace(1, -1, width, dtype=torch.float64) @ mix

    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return Case(weight, tokens(n), tokens(m) * scale)


def _reference(weight: Tensor, h: Matrix, g: Matrix, rank: int) -> tuple[Matrix, float]:
    """Return the best W′ of a rank and its loss, by Cholesky factors, an SVD and inverses."""
    left, right = np.linalg.cholesky(h), np.linalg.cholesky(g)
    u, sigma, vt = np.linalg.svd(left.T @ weight.numpy() @ right)
    best = np.linalg.inv(left.T) @ (u[:, :rank] * sigma[:rank] @ vt[:rank]) @ np.linalg.inv(right)
    return best, float((sigma[rank:] ** 2).sum())


def _loss(weight: Tensor, u: Tensor, v: Tensor, h: Matrix, g: Matrix) -> float:
    delta = (weight - u @ v).numpy()
    return float(np.trace(h @ delta @ g @ delta.T))


def decompose(
    method: str, weight: Tensor, statistics: Statistics, rank: int, **values: Any
) -> tuple[Tensor, Tensor]:
    return DECOMPOSERS.get(method)(
        weight, statistics, rank, **DECOMPOSERS.arguments(method, values)
    )


def _run(method: str, case: Case, rank: int, sides: Sides = SIDES[0]) -> tuple[Tensor, Tensor]:
    return decompose(method, case.weight, case.statistics(sides), rank, **KNOBS[method])


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KNOBS)
def test_it_is_the_best_in_its_metric(method: str, shape: tuple[int, int], sides: Sides) -> None:
    case = _case(shape)
    h, g = case.sides(method)
    for rank in (1, 6, min(shape) - 1):
        u, v = _run(method, case, rank, sides)
        assert (u.dtype, u.shape) == (torch.float64, (shape[0], rank))
        assert (v.dtype, v.shape) == (torch.float64, (rank, shape[1]))
        best, least = _reference(case.weight, h, g, rank)
        np.testing.assert_allclose((u @ v).numpy(), best, rtol=1e-6, atol=1e-7)
        assert _loss(case.weight, u, v, h, g) == pytest.approx(least, rel=1e-7)


@pytest.mark.parametrize("solver", ["eigh", "svd", "partial", "subspace"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KNOBS)
def test_every_solver_finds_it(
    method: str, shape: tuple[int, int], sides: Sides, solver: str
) -> None:
    case = _case(shape)
    h, g = case.sides(method)
    knobs = {**KNOBS[method], "solver": solver}
    u, v = decompose(method, case.weight, case.statistics(sides), 6, **knobs)
    _, least = _reference(case.weight, h, g, 6)
    assert _loss(case.weight, u, v, h, g) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_eigenproblem_is_that_of_the_smaller_side(shape: tuple[int, int]) -> None:
    case = _case(shape)
    sizes = []

    def find(gram: Tensor, rank: int) -> Tensor:
        sizes.append(tuple(gram.shape))
        return leading(gram, rank)[1]

    metric = fisher_metric(case.weight, case.statistics(), 0.02, 0.1)
    truncate(case.weight, metric, 6, eigenvectors=find)
    assert sizes == [(min(shape), min(shape))]


@pytest.mark.parametrize("method", KNOBS)
def test_moving_a_factor_does_not_help(method: str) -> None:
    case = _case((20, 34))
    h, g = case.sides(method)
    u, v = _run(method, case, 6)
    least = _loss(case.weight, u, v, h, g)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            du = torch.randn(u.shape, generator=generator, dtype=u.dtype) * size * u.std()
            dv = torch.randn(v.shape, generator=generator, dtype=v.dtype) * size * v.std()
            assert _loss(case.weight, u + du, v, h, g) > least
            assert _loss(case.weight, u, v + dv, h, g) > least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KNOBS)
def test_a_larger_rank_holds_the_smaller_ones(method: str, shape: tuple[int, int]) -> None:
    case = _case(shape)
    u, v = _run(method, case, 15)
    for rank in (1, 4, 14):
        small = _run(method, case, rank)
        torch.testing.assert_close(u[:, :rank] @ v[:rank], small[0] @ small[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KNOBS)
def test_full_rank_gives_the_matrix_back(method: str, shape: tuple[int, int]) -> None:
    case = _case(shape)
    u, v = _run(method, case, min(shape))
    torch.testing.assert_close(u @ v, case.weight)


@pytest.mark.parametrize("method", ["fwsvd", "gfwsvd", "fisher"])
def test_tiny_gradients_leave_no_trace_in_the_factors(method: str) -> None:
    u, v = _run(method, _case((20, 34), scale=1.0), 6)
    tiny_u, tiny_v = _run(method, _case((20, 34), scale=1e-9), 6)
    torch.testing.assert_close(tiny_u @ tiny_v, u @ v)
    torch.testing.assert_close(tiny_u.norm(dim=0), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shrinkage", [(0.0, 0.0), (0.02, 0.1), (0.3, 1.0)])
def test_fisher_energy_is_the_loss_of_each_rank(
    shape: tuple[int, int], sides: Sides, shrinkage: tuple[float, float]
) -> None:
    case = _case(shape)
    statistics = case.statistics(sides)
    no_g, no_h = (np.eye(width) for width in (shape[1], shape[0]))
    known = case.statistics()
    assert known.moment is not None
    assert known.gradient is not None
    g, h = known.moment.matrix.numpy(), known.gradient.moment.matrix.numpy()
    g = (1 - shrinkage[0]) * g + shrinkage[0] * g.diagonal().mean() * no_g
    h = (1 - shrinkage[1]) * h + shrinkage[1] * h.diagonal().mean() * no_h
    energy = fisher_energy(case.weight, statistics, *shrinkage)
    assert energy.shape == (min(shape),)
    assert bool((energy.diff() <= 0).all())
    for rank in (1, 6, 15):
        u, v = DECOMPOSERS.get("fisher")(
            case.weight,
            statistics,
            rank,
            input_shrinkage=shrinkage[0],
            output_shrinkage=shrinkage[1],
        )
        least = _reference(case.weight, h, g, rank)[1]
        assert float(energy[rank:].sum()) == pytest.approx(least, rel=1e-6)
        assert _loss(case.weight, u, v, h, g) == pytest.approx(least, rel=1e-6)


def test_without_gradients_fisher_is_whitened() -> None:
    case = _case((34, 20))
    dead = replace(case.statistics(), gradient=_gradient(torch.zeros(34, 34)))
    fisher = DECOMPOSERS.get("fisher")
    u, v = fisher(case.weight, dead, 6, input_shrinkage=0.0, output_shrinkage=0.1)
    whitened = _run("whitened", case, 6)
    torch.testing.assert_close(u @ v, whitened[0] @ whitened[1])
    assert not fisher_energy(case.weight, dead, 0.0, 0.1).any()


@pytest.mark.parametrize("method", ["fwsvd", "gfwsvd"])
def test_without_gradients_the_others_are_the_plain_svd(method: str) -> None:
    case = _case((34, 20))
    nothing = WeightGradients(torch.zeros(34, 20), torch.zeros(34, 34), torch.zeros(20, 20))
    u, v = decompose(method, case.weight, Statistics(weight_gradients=nothing), 6)
    plain = _run("svd", case, 6)
    torch.testing.assert_close(u @ v, plain[0] @ plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_sides_reach_the_optimum(
    shape: tuple[int, int], sides: Sides, dtype: torch.dtype
) -> None:
    # 9 tokens: neither H nor G has full rank, and in float32 they have negative eigenvalues too.
    few = _case(shape)
    case = Case(few.weight, few.x[:1, :9], few.g[:1, :9])
    full = case.statistics(sides)
    assert full.moment is not None
    assert full.gradient is not None
    moment = Moment(full.moment.matrix.to(dtype), sides[0])
    felt = Moment(full.gradient.moment.matrix.to(dtype), sides[1])
    gradient = Gradient(felt, full.gradient.mean_square)
    statistics = replace(full, moment=moment, gradient=gradient)
    x, g = case.x[0].numpy(), case.g[0].numpy()
    sigma = np.linalg.svd(g @ case.weight.numpy() @ x.T / 9, compute_uv=False)  # [9]
    total = float((sigma**2).sum())
    slack = 1e-9 if dtype == torch.float64 else 1e-4
    energy = fisher_energy(case.weight, statistics, 0.0, 0.0)
    for rank in (1, 5, 9, 12):
        u, v = DECOMPOSERS.get("fisher")(
            case.weight, statistics, rank, input_shrinkage=0.0, output_shrinkage=0.0
        )
        assert bool(u.isfinite().all() and v.isfinite().all())
        error = g @ (case.weight - u @ v).numpy() @ x.T / 9
        least = float((sigma[rank:] ** 2).sum())
        assert float((error**2).sum()) == pytest.approx(least, rel=1e-4, abs=slack * total)
        assert float(energy[rank:].sum()) == pytest.approx(least, rel=1e-4, abs=slack * total)


def test_a_channel_that_is_always_zero_counts_for_nothing() -> None:
    case = _case((20, 34))
    x = case.x.clone()
    x[:, :, 5] = 0
    u, v = _run("asvd", replace(case, x=x), 6)
    scale = np.sqrt(x.abs().mean((0, 1)).numpy())
    scale[5] = 1e-7 * scale.mean()  # small enough to be the limit, large enough to invert
    best, _ = _reference(case.weight, np.eye(20), np.diag(scale**2), 6)
    np.testing.assert_allclose((u @ v).numpy(), best, rtol=1e-5, atol=1e-6)


def test_a_row_without_gradient_costs_the_others_nothing() -> None:
    case = _case((20, 34))
    g = case.g.clone()
    g[:, :, 3] = 0
    u, v = _run("fwsvd", replace(case, g=g), 6)
    fisher = ((g.mT @ case.x) ** 2).mean(0).sum(1).numpy()
    sigma = np.linalg.svd(np.sqrt(fisher)[:, None] * case.weight.numpy(), compute_uv=False)
    loss = _loss(case.weight, u, v, np.diag(fisher), np.eye(34))
    assert loss == pytest.approx(float((sigma[6:] ** 2).sum()), rel=1e-8)


def test_one_short_sequence_is_enough_for_gfwsvd() -> None:
    few = _case((34, 20))
    case = Case(few.weight, few.x[:1, :5], few.g[:1, :5])  # both factors have rank 5
    each = (case.g.mT @ case.x)[0].numpy()
    u, v = _run("gfwsvd", case, 5)
    total = float(
        np.trace(each @ each.T @ case.weight.numpy() @ each.T @ each @ case.weight.T.numpy())
    )
    assert _loss(case.weight, u, v, each @ each.T, each.T @ each) < 1e-4 * total
    assert float((u @ v).abs().max()) < 100 * float(case.weight.abs().max())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_an_error(value: float) -> None:
    case = _case((20, 34))
    known = case.statistics()
    assert known.weight_gradients is not None
    broken = torch.eye(20, dtype=torch.float64)
    broken[4, 4] = value
    sequences = replace(known.weight_gradients, output=broken)
    statistics = replace(known, gradient=_gradient(broken), weight_gradients=sequences)
    for method in ("fisher", "fwsvd", "gfwsvd"):
        with pytest.raises(NumericalError, match="not finite"):
            decompose(method, case.weight, statistics, 3, **KNOBS[method])


def test_an_indefinite_gradient_moment_is_an_error() -> None:
    case = _case((20, 34))
    broken = replace(case.statistics(), gradient=_gradient(torch.diag(torch.linspace(-1, 2, 20))))
    with pytest.raises(NumericalError, match="not positive semidefinite"):
        fisher_energy(case.weight, broken, 0.0, 0.0)


def test_numerical_failures_name_the_sublayer() -> None:
    case = _case((20, 34))
    broken = replace(case.statistics(), moment=Moment(torch.full((34, 34), torch.nan), "input"))
    failed = pytest.raises(NumericalError, match=r"^layers\.3\.up: the decomposition did not")
    with failed, decomposing("layers.3.up"):
        DECOMPOSERS.get("whitened")(case.weight, broken, 3)
    gradient = replace(case.statistics(), gradient=_gradient(-torch.eye(20)))
    refused = pytest.raises(NumericalError, match=r"^layers\.3\.up: .*not positive semidefinite")
    with refused, decomposing("layers.3.up"):
        fisher_energy(case.weight, gradient, 0.0, 0.0)


@pytest.mark.parametrize(
    ("method", "command"),
    [
        ("asvd", "hisvd calibrate"),
        ("whitened", "hisvd calibrate"),
        ("fwsvd", "hisvd calibrate --weight-gradients"),
        ("gfwsvd", "hisvd calibrate --weight-gradients"),
        ("fisher", "hisvd calibrate --gradients"),
    ],
)
def test_missing_statistics_name_their_command(method: str, command: str) -> None:
    known = Statistics(Moment(torch.eye(3), "input")) if method == "fisher" else Statistics()
    with pytest.raises(SourceError, match=f"'{method}' needs") as caught:
        decompose(method, torch.eye(3), known, 1, **KNOBS[method])
    assert caught.value.hint == f"Run: {command}"
    assert command.rpartition("calibrate")[2].strip(" -") in {
        "" if need == "moments" else need for need in DECOMPOSERS.needs(method)
    }


def test_shrinking_an_output_moment_needs_the_channels() -> None:
    case = _case((20, 34))
    with pytest.raises(SourceError, match="'fisher' needs moments"):
        fisher_energy(
            case.weight, replace(case.statistics(("output", "output")), channels=None), 0.02, 0.1
        )


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KNOBS)
def test_randomized_is_exact_where_it_spans_everything(
    method: str, shape: tuple[int, int], sides: Sides
) -> None:
    case = _case(shape)
    exact = _run(method, case, 6, sides)
    knobs = {**RANDOM, "weighting": method, "oversamples": 99, "power_iterations": 0}
    u, v = decompose("randomized", case.weight, case.statistics(sides), 6, **knobs)
    assert u.shape == (shape[0], 6)
    torch.testing.assert_close(u @ v, exact[0] @ exact[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KNOBS)
def test_randomized_comes_close_with_power(method: str, shape: tuple[int, int]) -> None:
    case = _case(shape)
    h, g = case.sides(method)
    least = _reference(case.weight, h, g, 6)[1]
    losses = []
    for power in (0, 2, 8):
        knobs = {**RANDOM, "weighting": method, "oversamples": 4, "power_iterations": power}
        u, v = decompose("randomized", case.weight, case.statistics(), 6, **knobs)
        losses.append(_loss(case.weight, u, v, h, g) / least)
    assert 1 - 1e-9 <= losses[2] <= losses[1] <= losses[0]
    assert losses[1] < 1.1
    assert losses[2] < 1.01


def test_randomized_depends_on_the_seed_alone() -> None:
    case = _case((20, 34))
    knobs = {**RANDOM, "weighting": "whitened", "oversamples": 2, "power_iterations": 0}
    torch.manual_seed(1)
    first = decompose("randomized", case.weight, case.statistics(), 6, **knobs)
    torch.manual_seed(2)
    again = decompose("randomized", case.weight, case.statistics(), 6, **knobs)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = decompose("randomized", case.weight, case.statistics(), 6, **{**knobs, "seed": 4})
    assert not torch.allclose(first[0] @ first[1], other[0] @ other[1])


def test_an_unknown_weighting() -> None:
    knobs = {**RANDOM, "weighting": "whitend", "oversamples": 2, "power_iterations": 0}
    with pytest.raises(ValidationError, match="'whitened'"):
        decompose("randomized", torch.eye(3), Statistics(), 1, **knobs)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_component_changes_are_zero_sums_definition(shape: tuple[int, int], sides: Sides) -> None:
    case = _case(shape)
    x = case.x.flatten(0, 1).numpy()
    gradient = np.mean([b.T @ a for a, b in zip(case.x.numpy(), case.g.numpy(), strict=True)], 0)
    root = np.linalg.cholesky(x.T @ x / len(x))
    u, sigma, vt = np.linalg.svd(case.weight.numpy() @ root, full_matrices=False)
    whitened = u.T @ (gradient @ np.linalg.inv(root.T)) @ vt.T
    changes = component_changes(case.weight, case.statistics(sides)).numpy()
    expected = -sigma * whitened.diagonal()
    np.testing.assert_allclose(changes, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())


def test_component_changes_predict_a_small_step() -> None:
    # A loss that is linear in W: taking component i away changes it by exactly δ_i.
    case = _case((34, 20))
    statistics = case.statistics()
    assert statistics.weight_gradients is not None
    gradient = statistics.weight_gradients.mean
    changes = component_changes(case.weight, statistics)
    u, v = _run("whitened", case, 20)
    for i in (0, 7, 19):
        less = case.weight - u[:, i : i + 1] @ v[i : i + 1]
        change = float((gradient * less).sum() - (gradient * case.weight).sum())
        assert float(changes[i]) == pytest.approx(change, rel=1e-6)


def test_component_changes_name_the_command_they_need() -> None:
    known = Statistics(Moment(torch.eye(3), "input"))
    with pytest.raises(SourceError) as caught:
        component_changes(torch.eye(3), known)
    assert caught.value.hint == "Run: hisvd calibrate --weight-gradients"
