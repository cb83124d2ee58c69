"""The low-rank layer against the product of its factors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hisvd_cli.allocation.budget import cost
from hisvd_cli.linalg.pivoting import pivoted
from hisvd_cli.modeling.layers.lowrank import (
    FACTORS,
    LAYERS,
    LowRankLinear,
    PivotedLinear,
    factor_shapes,
)

M, N, RANK = 12, 20, 5  # y = W x, W [12, 20]


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``[m, r]``, V ``[r, n]`` and b ``[m]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, RANK), (RANK, N), (M,))
    u, v, b = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return u, v, b


def layer_of(u: Tensor, v: Tensor, b: Tensor | None = None, storage: str = "pair") -> LowRankLinear:
    """Return a layer that computes U V x + b."""
    tensors = (v, u) if storage == "pair" else pivoted(u, v)
    state = dict(zip(FACTORS[storage], tensors, strict=True))
    (m, rank), n = u.shape, v.shape[1]
    layer = LAYERS[storage](n, m, rank, b is not None, dtype=u.dtype)
    layer.load_state_dict(state if b is None else {**state, "bias": b})
    return layer


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (3, N), (2, 3, N), (0, N)])
def test_forward_equals_the_dense_product(
    shape: tuple[int, ...], with_bias: bool, storage: str
) -> None:
    u, v, b = factors()
    layer = layer_of(u, v, b if with_bias else None, storage)
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ (u @ v).T + (b if with_bias else 0)
    assert layer(x).shape == (*shape[:-1], M)
    torch.testing.assert_close(layer(x), expected)


def test_tensors_have_the_names_and_shapes_of_the_format() -> None:
    state = LowRankLinear(N, M, RANK).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        "weight": [RANK, N],
        "weight_u": [M, RANK],
        "bias": [M],
    }
    assert set(LowRankLinear(N, M, RANK, bias=False).state_dict()) == {"weight", "weight_u"}


@pytest.mark.parametrize("storage", LAYERS)
def test_layers_hold_the_tensors_that_their_storage_names(storage: str) -> None:
    layer = LAYERS[storage](N, M, RANK, bias=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == factor_shapes(layer.storage, M, N, RANK)
    assert sum(map(math.prod, shapes.values())) == cost(RANK, (M, N), layer.storage)


def test_device_and_dtype_reach_every_tensor() -> None:
    layer = LowRankLinear(N, M, RANK, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_new_layers_hold_finite_numbers() -> None:
    layer = LowRankLinear(N, M, RANK)
    assert all(torch.isfinite(p).all() and p.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, not {rank}"):
        LowRankLinear(N, M, rank)


def test_a_pivoted_layer_has_fewer_directions_than_outputs() -> None:
    with pytest.raises(ValueError, match="less than its 12 outputs, not 12"):
        PivotedLinear(N, M, M)


@pytest.mark.parametrize("storage", LAYERS)
def test_dense_weight_is_the_product(storage: str) -> None:
    u, v, b = factors()
    torch.testing.assert_close(layer_of(u, v, b, storage).dense_weight(), u @ v)


def test_dense_weight_of_half_precision_is_rounded_once() -> None:
    u, v, _ = factors(torch.bfloat16)
    weight = layer_of(u, v).dense_weight()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (u.float() @ v.float()).bfloat16())
    weight = layer_of(u, v).dense_weight(torch.float32)
    assert torch.equal(weight, u.float() @ v.float())


def test_repr_shows_the_rank() -> None:
    assert repr(LowRankLinear(N, M, RANK, bias=False)) == (
        "LowRankLinear(in_features=20, out_features=12, rank=5, bias=False)"
    )


def test_gradients_reach_all_tensors() -> None:
    layer = layer_of(*factors())
    dense = nn.Linear(N, M, dtype=torch.float64)
    x = torch.randn(4, N, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense.load_state_dict({"weight": layer.dense_weight().detach(), "bias": layer.bias})
    dense(x).square().sum().backward()
    u, v, b = (p.detach() for p in (layer.weight_u, layer.weight, layer.bias) if p is not None)
    assert dense.weight.grad is not None
    torch.testing.assert_close(layer.weight_u.grad, dense.weight.grad @ v.T)
    torch.testing.assert_close(layer.weight.grad, u.T @ dense.weight.grad)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert b.shape == (M,)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("shape", [(M,), (3, M), (2, 3, M), (0, M), (2, 0, M)])
def test_wide_pivoted_outputs_are_those_of_the_product(
    shape: tuple[int, ...], gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gathered:
        monkeypatch.setattr("hisvd_cli.modeling.layers.lowrank._MULTIPLICATIONS", 0)
    u, v, _ = factors()
    layer = layer_of(v.T.contiguous(), u.T.contiguous(), torch.arange(N).double(), "pivoted")
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, x @ (u @ v) + torch.arange(N))
    assert y.view(-1, N).shape == (x.numel() // M, N)  # as models flatten tokens


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("size", [(M, N), (N, M)])
def test_many_tokens_at_once_are_what_they_are_one_by_one(
    size: tuple[int, int], with_bias: bool, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gathered:
        monkeypatch.setattr("hisvd_cli.modeling.layers.lowrank._MULTIPLICATIONS", 0)
    (m, n), generator = size, torch.Generator().manual_seed(0)
    u, v, b, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((m, RANK), (RANK, n), (m,), (4 * RANK, n))
    )
    layer = layer_of(u, v, b if with_bias else None, "pivoted")
    found = layer(x)
    torch.testing.assert_close(found, torch.stack([layer(token) for token in x]))
    many, single = (
        torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        for y in (found, torch.stack([layer(token) for token in x]))
    )
    torch.testing.assert_close(many, single)


@pytest.mark.parametrize("storage", LAYERS)
def test_gradients_of_inputs_are_those_of_the_product(storage: str) -> None:
    u, v, _ = factors()
    for left, right in ((u, v), (v.T.contiguous(), u.T.contiguous())):
        layer = layer_of(left, right, storage=storage)
        x = torch.randn(4, right.shape[1], dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        product = left @ right
        torch.testing.assert_close(found, 2 * x.detach() @ product.T @ product)


@pytest.mark.parametrize("tokens", [RANK, RANK + 1])
@pytest.mark.parametrize("storage", LAYERS)
def test_compiles_into_one_graph(storage: str, tokens: int) -> None:
    layer = layer_of(*factors(), storage=storage)
    # The eager backend traces as any other does and needs no compiler on the machine.
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(tokens, N, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))
