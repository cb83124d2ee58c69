"""Tiny models in the formats of other quantizers, packed here by the formats' definitions alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import edit_json

FLOAT8_MAX = 448.0
Tensors = dict[str, Tensor]
Packer = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""Name without ``.weight`` and weight ─► what is stored, and the values that it stands for."""


def block_float8(name: str, weight: Tensor, size: int = 16) -> tuple[Tensors, Tensor]:
    """DeepSeek-V3: a scale for each square, of which the last may be cut off."""
    m, n = weight.shape
    stored = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-m // size), -(-n // size))
    values = torch.empty(m, n)
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            place = (slice(i * size, i * size + size), slice(j * size, j * size + size))
            scales[i, j] = weight[place].abs().max() / FLOAT8_MAX
            stored[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            values[place] = stored[place].float() * scales[i, j]
    return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scales}, values


def row_float8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """A scale for each output, as compressed-tensors and FBGEMM store it."""
    scale = weight.abs().amax(1, keepdim=True) / FLOAT8_MAX
    stored = (weight / scale).to(torch.float8_e4m3fn)
    parts = {f"{name}.weight": stored, f"{name}.weight_scale": scale}
    return parts, stored.float() * scale


def whole_float8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """One scale for a whole matrix, and one for its input, as ModelOpt stores it."""
    scale = weight.abs().max() / FLOAT8_MAX
    stored = (weight / scale).to(torch.float8_e4m3fn)
    parts = {f"{name}.weight": stored, f"{name}.weight_scale": scale}
    return {**parts, f"{name}.input_scale": torch.tensor(0.5)}, stored.float() * scale


def bare_float8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Cast and nothing else."""
    stored = weight.to(torch.float8_e4m3fn)
    return {f"{name}.weight": stored}, stored.float()


def row_int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors' int-quantized with zero points: a scale for each output."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    stored = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
    parts = {f"{name}.weight": stored, f"{name}.weight_scale": scale}
    parts[f"{name}.weight_zero_point"] = zero.to(torch.int8)
    return parts, (stored.float() - zero) * scale


def words(values: Tensor, bits: int) -> Tensor:
    """Pack signed integers ``[m, n]`` into int32 words ``[m, w]``, the first in the lowest bits."""
    per_word = 32 // bits
    rows = []
    for row in (values.to(torch.int64) + (1 << (bits - 1))).tolist():
        padded = row + [0] * (-len(row) % per_word)
        packed = [
            sum(value << (bits * place) for place, value in enumerate(padded[k : k + per_word]))
            for k in range(0, len(padded), per_word)
        ]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def packed_integers(
    name: str, weight: Tensor, bits: int = 4, group: int = 16, shuffled: bool = False
) -> tuple[Tensors, Tensor]:
    """compressed-tensors' pack-quantized: groups of columns with a scale and a zero point."""
    m, n = weight.shape
    order = torch.arange(n) // group
    if shuffled:
        order = order[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    top = (1 << bits) - 1
    scale, zero = torch.empty(m, n // group), torch.empty(m, n // group)
    for g in range(n // group):
        part = weight[:, order == g]
        scale[:, g] = (part.amax(1) - part.amin(1)) / top
        zero[:, g] = (-(top + 1) / 2 - part.amin(1) / scale[:, g]).round().clamp(-8, 7)
    wide, zeros = scale[:, order], zero[:, order]
    stored = (weight / wide + zeros).round().clamp(-(top + 1) / 2, top // 2)
    parts = {
        f"{name}.weight_packed": words(stored, bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor([m, n]),
        f"{name}.weight_zero_point": words(zero.T, bits).T.contiguous(),
    }
    if shuffled:
        parts[f"{name}.weight_g_idx"] = order.to(torch.int32)
    return parts, (stored - zeros) * wide


def pack(folder: Path, packer: Packer, said: dict[str, Any] | None) -> Tensors:
    """Quantize the matrices of a model's blocks where they lie; return all plain tensors."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".layers." in name and tensor.ndim == 2:
            parts, values = packer(name.removesuffix(".weight"), tensor.float())
            stored |= parts
            plain[name] = values
        else:
            stored[name] = plain[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if said is not None:
        edit_json(folder / "config.json", quantization_config=said)
    return plain
