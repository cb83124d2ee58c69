"""Linear layers whose matrices are integers: 8 bits a number, or 4.

A matrix ``[m, n]`` is stored as two tensors. With 8 bits: int8 codes ``[m, n]`` and a scale a row,
``[m, 1]``. With 4 bits: two codes a byte (uint8 ``[m, ⌈n/2⌉]``, the even column in the lower half,
each plus 8) and a scale for each group of ``group_size`` columns of a row, ``[m, ⌈n/group_size⌉]``,
the last group short where n is no multiple. A number is code × scale; there is no zero point, and
a scale may be negative, so that the code −8 serves whichever end reaches further. A low-rank layer
of 4 bits is a plain pair, whatever the storage of the others (``rounding`` says why).

Scales are float16, and stored as their 16 bits in int16: transformers 4.57 rounds whatever floats a
checkpoint holds to the model's dtype, and so does ``model.to(torch.bfloat16)``, which would leave a
scale 8 bits. Libraries' own tensor types do not serve here: torchao's do not store in safetensors
(0.18 with torch 2.13: "invalid python storage") unless torchao flattens them, and transformers
takes that back only for checkpoints whose one quantization method is torchao.

This file travels with every checkpoint (see ``transformers_plugin.remote_code_files``), so it
imports torch and nothing else.
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
"""Names of what is quantized, where a layer has it."""
SCALE = "_scale"
"""Ending of the name of a matrix's scales."""
_LARGEST = {4: 8, 8: 127}


def storage_with(bits: int | None, storage: Storage) -> Storage:
    """Return how a low-rank layer is stored in a checkpoint of a storage (bits None: no
    integers)."""
    return "pair" if bits == 4 else storage


def quantized_bytes(shape: tuple[int, int], bits: int, group: int) -> int:
    """Return the bytes that a matrix takes on disk, its scales included.

    Args:
        shape: ``(m, n)``.
        bits: 8 or 4.
        group: columns that share a scale, with 4 bits.
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
    """Return the names and shapes of a layer's tensors on disk from those in full precision."""
    stored = dict(shapes)
    for leaf in MATRICES:
        if leaf in shapes:
            stored[leaf], stored[leaf + SCALE] = _shapes(shapes[leaf], bits, group)
    return stored


def pack(codes: Tensor) -> Tensor:
    """Pack codes from −8 to 7, int8 ``[m, n]``, into bytes ``[m, ⌈n/2⌉]``."""
    shifted = F.pad(codes, (0, codes.shape[1] % 2)).add(8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return the codes ``[m, columns]``, int8, of packed bytes."""
    pairs = torch.stack([packed & 15, packed >> 4], -1)
    return pairs.flatten(1)[:, :columns].to(torch.int8) - 8


def dequantize(
    codes: Tensor, scales: Tensor, columns: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Return the matrix ``[m, columns]``: code × scale, a product in float32 that is rounded once.

    Args:
        codes: as stored: int8 (8 bits), or uint8 (two of 4 bits each).
        scales: the bits of float16, int16.
        columns: n.
        group: columns that share a scale, with 4 bits.
        dtype: of the result.
    """
    scale = scales.view(torch.float16).float()
    if codes.dtype != torch.uint8:
        return (codes * scale).to(dtype)
    whole = F.pad(unpack(codes, columns), (0, -columns % group))  # groups as a dimension of theirs
    numbers = whole.view(len(codes), -1, group) * scale[..., None]
    return numbers.to(dtype).flatten(1)[:, :columns]


def dequantized(tensors: Mapping[str, Tensor], inputs: int, group: int) -> dict[str, Tensor]:
    """Return the tensors of a layer on disk with its matrices in float32, as they would be without
    quantization.

    Args:
        tensors: by the names of :func:`quantized_shapes`.
        inputs: n of the layer.
        group: columns that share a scale, with 4 bits.
    """
    columns = {"weight": inputs, "weight_u": len(tensors["weight"])}
    plain = {leaf: tensor for leaf, tensor in tensors.items() if not leaf.endswith(SCALE)}
    for leaf in MATRICES:
        if leaf + SCALE in tensors:
            scales = tensors[leaf + SCALE]
            plain[leaf] = dequantize(plain[leaf], scales, columns[leaf], group, torch.float32)
    return plain


class _Quantized(nn.Module):
    """Stands in front of a layer's class and keeps its matrices as codes and scales.

    They are parameters without gradients: such a layer cannot be trained.

    Args:
        args: of the layer.
        bits: 8 or 4.
        group_size: columns that share a scale, with 4 bits.
        kwargs: of the layer.

    Raises:
        ValueError: other bits, or a group of no columns.
    """

    def __init__(self, *args: Any, bits: int, group_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if bits not in BITS or group_size < 1:
            raise ValueError(f"There are no {bits} bits in groups of {group_size}.")
        self.bits = bits
        self.group_size = group_size
        self._columns: dict[str, int] = {}
        for leaf in MATRICES:
            if leaf in self._parameters:
                self._set_random(leaf)

    def _set_random(self, leaf: str) -> None:
        """Put random codes of the right shape in the place of a matrix."""
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
        """Return a matrix as numbers, by default in float32."""
        codes, scales = getattr(self, leaf), getattr(self, leaf + SCALE)
        columns = self._columns[leaf]
        return dequantize(codes, scales, columns, self.group_size, dtype or torch.float32)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the layer's tensors, its bias apart."""
        whole: dict[str, tuple[int, ...]] = super().stored_shapes()  # type: ignore[misc]
        return quantized_shapes(whole, self.bits, self.group_size)

    def extra_repr(self) -> str:
        """Describe the layer as its class does, with its bits."""
        return f"{super().extra_repr()}, bits={self.bits}"


class _DenseLinear(nn.Module):
    """The tensors of a dense layer. It is no ``nn.Linear``: what expects one would take codes for
    numbers."""

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
    """A dense layer of integers: ``y = Wx + b``, W made anew for each call."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``[..., in_features]`` to y ``[..., out_features]``."""
        return F.linear(x, self.matrix("weight", x.dtype), self.bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W ``[out_features, in_features]``, by default in float32."""
        return self.matrix("weight", dtype)


class QuantizedLowRankLinear(_Quantized, LowRankLinear):
    """A low-rank layer whose U and V are integers."""

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return V and U as numbers, by default in float32."""
        return self.matrix("weight", dtype), self.matrix("weight_u", dtype)


class QuantizedPivotedLinear(QuantizedLowRankLinear, PivotedLinear):
    """A low-rank layer in pivoted storage whose V′ and C are integers."""


QUANTIZED: dict[str, type[QuantizedLowRankLinear]] = {
    c.storage: c for c in (QuantizedLowRankLinear, QuantizedPivotedLinear)
}
"""Storage → layer of integers."""
