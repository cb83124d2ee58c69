"""Quantized linear layers, with 8 or 4 bits per value.

A matrix ``[m, n]`` is stored as two tensors. With 8 bits: int8 codes ``[m, n]`` and one scale per
row, ``[m, 1]``. With 4 bits: two codes per byte (uint8 ``[m, ⌈n/2⌉]``, the even column in the lower
half, each offset by 8) and one scale per group of ``group_size`` columns of a row,
``[m, ⌈n/group_size⌉]``; the last group may be smaller. A value is code × scale. There is no zero
point; a scale may be negative, so that the code −8 represents the extreme of either sign. A 4-bit
low-rank layer is always a plain pair, whatever the storage of the others (see ``rounding``).

Scales are float16, stored as int16 bit patterns: transformers 4.57 and ``model.to(torch.bfloat16)``
convert all floating-point tensors to the model's dtype, which would reduce scales to 8 bits.
Tensor types of other libraries do not work here: torchao's cannot be stored in safetensors (0.18
with torch 2.13: "invalid python storage") unless torchao flattens them, and transformers only
restores flattened tensors of checkpoints whose quantization method is torchao.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from .lowrank import LowRankLinear, PivotedLinear, Storage

BITS = (4, 8)
MATRICES = ("weight", "weight_u")
"""Names of the tensors that are quantized, if a layer has them."""
SCALE = "_scale"
"""Suffix of the name of a matrix's scales."""
_LARGEST = {4: 8, 8: 127}


def storage_with(bits: int | None, storage: Storage) -> Storage:
    """Return the storage of a low-rank layer in a checkpoint of the given storage.

    Args:
        bits: bits of the layer; None if it is not quantized.
        storage: storage of the checkpoint.
    """
    return "pair" if bits == 4 else storage


def quantized_bytes(shape: tuple[int, int], bits: int, group: int) -> int:
    """Return the size of a quantized matrix on disk in bytes, including scales.

    Args:
        shape: ``(m, n)``.
        bits: 8 or 4.
        group: columns per scale with 4 bits.
    """
    codes, scales = _shapes(shape, bits, group)
    return codes[0] * codes[1] + 2 * scales[0] * scales[1]


def _shapes(shape: tuple[int, ...], bits: int, group: int) -> tuple[tuple[int, int], ...]:
    rows, columns = shape
    if bits == 8:
        return (rows, columns), (rows, 1)
    return (rows, ceil(columns / 2)), (rows, ceil(columns / group))


def quantized_shapes(
    shapes: Mapping[str, tuple[int, ...]], bits: int, group: int
) -> dict[str, tuple[int, ...]]:
    """Return name → shape of a layer's tensors on disk.

    Args:
        shapes: name → shape in full precision.
        bits: 8 or 4.
        group: columns per scale with 4 bits.
    """
    stored = dict(shapes)
    for leaf in MATRICES:
        if leaf in shapes:
            stored[leaf], stored[leaf + SCALE] = _shapes(shapes[leaf], bits, group)
    return stored


def pack(codes: Tensor) -> Tensor:
    """Pack int8 codes from −8 to 7 ``[m, n]`` into bytes ``[m, ⌈n/2⌉]``."""
    shifted = F.pad(codes, (0, codes.shape[1] % 2)).add(8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return the int8 codes ``[m, columns]`` of packed bytes."""
    pairs = torch.stack([packed & 15, packed >> 4], -1)
    return pairs.flatten(1)[:, :columns].to(torch.int8) - 8


def dequantize(
    codes: Tensor, scales: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Return the matrix ``[m, columns]``: code × scale, computed in float32 and rounded once.

    Args:
        codes: as stored: int8 (8 bits), or uint8 (two 4-bit codes).
        scales: float16 bit patterns in int16.
        columns: n.
        group: columns per scale with 4 bits.
        dtype: dtype of the result.
    """
    scale = scales.view(torch.float16).float()
    if codes.dtype != torch.uint8:
        return (codes * scale).to(dtype)
    whole = F.pad(unpack(codes, columns), (0, -columns % group))  # to a multiple of the group
    numbers = whole.view(len(codes), -1, group) * scale[..., None]
    return numbers.to(dtype).flatten(1)[:, :columns]


def dequantized(tensors: Mapping[str, Tensor], inputs: int, group: int) -> dict[str, Tensor]:
    """Return the tensors of a layer with its matrices dequantized to float32.

    Args:
        tensors: the layer's tensors by the names of :func:`quantized_shapes`.
        inputs: n of the layer.
        group: columns per scale with 4 bits.
    """
    columns = {"weight": inputs, "weight_u": len(tensors["weight"])}
    plain = {leaf: tensor for leaf, tensor in tensors.items() if not leaf.endswith(SCALE)}
    for leaf in MATRICES:
        if leaf + SCALE in tensors:
            scales = tensors[leaf + SCALE]
            plain[leaf] = dequantize(plain[leaf], scales, columns[leaf], group, torch.float32)
    return plain


class _Quantized(nn.Module):
    """Mixin that stores the matrices of a layer class as codes and scales.

    They are parameters without gradients, so such a layer cannot be trained.

    Args:
        args: arguments of the layer class.
        bits: 8 or 4.
        group_size: columns per scale with 4 bits.
        kwargs: arguments of the layer class.

    Raises:
        ValueError: ``bits`` is not 8 or 4, or ``group_size`` is less than 1.
    """

    def __init__(self, *args: Any, bits: int, group_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if bits not in BITS or group_size < 1:
            raise ValueError(
                f"Unsupported quantization: {bits} bits with a group size of {group_size}."
            )
        self.bits = bits
        self.group_size = group_size
        self._columns: dict[str, int] = {}
        for leaf in MATRICES:
            if leaf in self._parameters:
                self._set_random(leaf)

    def _set_random(self, leaf: str) -> None:
        """Replace a matrix by random codes and constant scales."""
        matrix: Tensor = getattr(self, leaf)
        self._columns[leaf] = columns = matrix.shape[1]
        codes, scales = _shapes(tuple(matrix.shape), self.bits, self.group_size)
        low, high, dtype = (0, 256, torch.uint8) if self.bits == 4 else (-127, 128, torch.int8)
        size = 1 / (_LARGEST[self.bits] * sqrt(columns))
        drawn = torch.randint(low, high, codes, dtype=dtype, device=matrix.device)
        scale = torch.full(scales, size, dtype=torch.float16, device=matrix.device)
        setattr(self, leaf, nn.Parameter(drawn, requires_grad=False))
        bits = nn.Parameter(scale.view(torch.int16), requires_grad=False)
        self.register_parameter(leaf + SCALE, bits)

    def matrix(self, leaf: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a dequantized matrix, by default in float32."""
        codes, scales = getattr(self, leaf), getattr(self, leaf + SCALE)
        columns = self._columns[leaf]
        return dequantize(codes, scales, columns, self.group_size, dtype or torch.float32)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name → shape of the layer's tensors, without the bias."""
        whole: dict[str, tuple[int, ...]] = super().stored_shapes()  # type: ignore[misc]
        return quantized_shapes(whole, self.bits, self.group_size)

    def extra_repr(self) -> str:
        """Describe the layer as its class does, with the bits added."""
        return f"{super().extra_repr()}, bits={self.bits}"


class _DenseLinear(nn.Module):
    """The tensors of a dense layer. Not an ``nn.Linear``, because code that expects one would use
    the codes as values."""

    conv1d: type[nn.Module] | None = None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.register_parameter("bias", zeros if bias else None)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_features, self.in_features)}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class QuantizedLinear(_Quantized, _DenseLinear):
    """A quantized dense layer: ``y = Wx + b``, with W dequantized on every call."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``[..., in_features]`` to y ``[..., out_features]``."""
        return F.linear(x, self.matrix("weight", x.dtype), self.bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W ``[out_features, in_features]``, by default in float32."""
        return self.matrix("weight", dtype)


class QuantizedLowRankLinear(_Quantized, LowRankLinear):
    """A low-rank layer with quantized U and V."""

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the dequantized V and U, by default in float32."""
        return self.matrix("weight", dtype), self.matrix("weight_u", dtype)


class QuantizedPivotedLinear(QuantizedLowRankLinear, PivotedLinear):
    """A low-rank layer in pivoted storage with quantized V′ and C."""


QUANTIZED: dict[str, type[QuantizedLowRankLinear]] = {
    c.storage: c for c in (QuantizedLowRankLinear, QuantizedPivotedLinear)
}
"""Storage → quantized layer."""
