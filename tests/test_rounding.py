"""Integers: packing, rounding, and what error compensation gains, each found another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hisvd_cli.compression.rounded_sublayers import quantize_compensated, quantize_nearest
from hisvd_cli.compression.rounding import metric_of, round_compensated, round_nearest
from hisvd_cli.linalg.pivoting import pivoted
from hisvd_cli.modeling.layers.lowrank import dense_product
from hisvd_cli.modeling.layers.quantized import (
    QUANTIZED,
    QuantizedLinear,
    dequantized,
    pack,
    quantized_bytes,
    quantized_shapes,
    unpack,
)
from hisvd_cli.utils.errors import NumericalError

SHAPES = [(3, 8), (5, 7), (1, 1), (4, 33), (16, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(size: int, tokens: int = 200) -> Tensor:
    """Return E[x xᵀ] of channels of very different size that move together."""
    x = drawn(tokens, size, seed=1) @ drawn(size, size, seed=2)
    x = x * torch.logspace(0, -2, size)
    return x.T @ x / tokens


def loss(matrix: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the error of the output."""
    error = (matrix - rounded).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_loses_nothing(shape: tuple[int, int]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack(codes)
    assert packed.shape == (shape[0], -(-shape[1] // 2))
    assert torch.equal(unpack(packed, shape[1]), codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_tensors(shape: tuple[int, int], bits: int) -> None:
    stored = quantize_nearest({"weight": drawn(*shape)}, bits, 4)
    assert sum(tensor.nbytes for tensor in stored.values()) == quantized_bytes(shape, bits, 4)
    expected = quantized_shapes({"weight": shape}, bits, 4)
    assert {leaf: tuple(tensor.shape) for leaf, tensor in stored.items()} == expected


def test_eight_bits_are_those_of_numpy() -> None:
    matrix = drawn(5, 33)
    values = matrix.numpy()
    scale = (np.abs(values).max(1, keepdims=True) / np.float32(127)).astype(np.float16)
    wide = scale.astype(np.float32)
    rounded = round_nearest(matrix, 8, 64)
    assert np.array_equal(rounded.codes.numpy(), np.clip(np.rint(values / wide), -127, 127))
    assert np.array_equal(rounded.scales.numpy(), scale)


def test_four_bits_take_the_scale_of_least_error() -> None:
    matrix = drawn(6, 20)
    rounded = round_nearest(matrix, 4, 8)
    for row in range(6):
        for group, start in enumerate(range(0, 20, 8)):
            part = matrix[row, start : start + 8].numpy().astype(np.float64)
            widest = part[np.abs(part).argmax()] / -8
            tried = [float(np.float16(widest * (1 - 0.0125 * i))) for i in range(13)]
            errors = [((np.clip(np.rint(part / s), -8, 7) * s - part) ** 2).sum() for s in tried]
            assert float(rounded.scales[row, group]) == pytest.approx(tried[int(np.argmin(errors))])


def by_columns(matrix: Tensor, hessian: Tensor, scales: Tensor, damping: float) -> Tensor:
    """Round column after column and solve anew, each time, for all that are left: no inverse is
    updated, no block is kept back."""
    count = matrix.shape[1]
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(count)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    goal, codes = matrix.double().clone(), torch.zeros(matrix.shape, dtype=torch.int8)
    for i, column in enumerate(order):
        scale = scales[:, column].double()
        codes[:, column] = (goal[:, column] / scale).round().clamp(-8, 7).to(torch.int8)
        left = order[i + 1 :]
        error = codes[:, column] * scale - goal[:, column]
        if left:  # least squares: what the other columns should be now that this one is wrong
            pull = torch.linalg.solve(damped[left][:, left], damped[left, column])
            goal[:, left] -= error[:, None] * pull
    return codes


@pytest.mark.parametrize(("rows", "columns", "group"), [(4, 9, 4), (3, 150, 32), (6, 16, 16)])
def test_gptq_is_least_squares_column_by_column(rows: int, columns: int, group: int) -> None:
    matrix, hessian = drawn(rows, columns), moment(columns)
    rounded = round_compensated(matrix, metric_of(hessian, 0.01), 4, group)
    scales = rounded.scales.float().repeat_interleave(group, 1)[:, :columns]
    same = rounded.codes == by_columns(matrix, hessian, scales, 0.01)
    assert same.float().mean() > 0.99  # a number in the middle of two codes may go either way


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_loses_less_than_the_nearest(bits: int) -> None:
    matrix, hessian = drawn(24, 40), moment(40)
    nearest = round_nearest(matrix, bits, 16).matrix()
    compensated = round_compensated(matrix, metric_of(hessian, 0.01), bits, 16).matrix()
    assert loss(matrix, compensated, hessian) < 0.5 * loss(matrix, nearest, hessian)


def factors_of(storage: str) -> dict[str, Tensor]:
    """Return the tensors of a sublayer ``[24, 40]`` of rank 10."""
    u, v = drawn(24, 10, seed=3), drawn(10, 40, seed=4)
    if storage == "dense":
        return {"weight": u @ v}
    if storage == "pair":
        return {"weight": v, "weight_u": u}
    return dict(zip(("weight", "weight_u", "weight_order"), pivoted(u, v), strict=True))


def product(tensors: dict[str, Tensor]) -> Tensor:
    plain = dequantized(tensors, 40, 16)
    return dense_product(plain) if "weight_u" in plain else plain["weight"]


@pytest.mark.parametrize("storage", ["pair", "pivoted", "dense"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_sublayer_stays_what_it_was(storage: str, bits: int) -> None:
    factors, hessian = factors_of(storage), moment(40)
    whole = drawn(24, 10, seed=3) @ drawn(10, 40, seed=4)
    energy = loss(whole, torch.zeros_like(whole), hessian)
    nearest = product(quantize_nearest(factors, bits, 16))
    compensated = product(quantize_compensated(factors, metric_of(hessian, 0.01), bits, 16, 0.01))
    lost = [loss(whole, made, hessian) / energy for made in (nearest, compensated)]
    assert lost[1] < lost[0] < (3e-4 if bits == 8 else 0.05)


def test_the_layer_multiplies_what_was_stored() -> None:
    x = drawn(3, 40)
    for storage in ("pair", "pivoted", "dense"):
        stored = quantize_nearest(factors_of(storage), 8, 16)
        sizes = {"in_features": 40, "out_features": 24, "bits": 8, "group_size": 16}
        layer: torch.nn.Module
        if storage == "dense":
            layer = QuantizedLinear(**sizes, bias=False)
        else:
            layer = QUANTIZED[storage](**sizes, rank=10, bias=False)
        layer.load_state_dict(stored)
        torch.testing.assert_close(layer(x), x @ product(stored).T, rtol=1e-4, atol=1e-4)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.to(torch.bfloat16)  # a scale of 8 bits would be another one
        assert all(torch.equal(before[n], tensor) for n, tensor in layer.state_dict().items())
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_dead_channel_and_a_singular_moment_are_no_special_case() -> None:
    matrix = drawn(6, 20)
    matrix[2] = 0
    few = drawn(3, 20)
    few[:, 7] = 0
    for hessian in (few.T @ few, torch.zeros(20, 20)):
        made = round_compensated(matrix, metric_of(hessian, 0.01), 4, 8).matrix()
        assert bool(made.isfinite().all())
        assert float((made - matrix).abs().max()) < 2
    assert not bool(made[2].any())


def test_what_is_no_number_is_refused() -> None:
    matrix = drawn(4, 8)
    with pytest.raises(NumericalError, match="moment"):
        metric_of(torch.full((8, 8), torch.nan), 0.01)
    matrix[1, 2] = torch.nan
    for bits in (8, 4):
        with pytest.raises(NumericalError, match="not finite"):
            round_nearest(matrix, bits, 8)
    with pytest.raises(NumericalError, match="too large"):
        round_nearest(torch.full((2, 2), 1e9), 8, 8)
