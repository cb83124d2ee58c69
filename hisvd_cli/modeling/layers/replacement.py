"""Replaces the dense layers of a model by low-rank and quantized ones, and back.

Dense layers are ``nn.Linear``, transformers' ``Conv1D`` (GPT-2), and stacks of experts (see
``experts``).

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch, transformers and the other copied files.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import ExpertLayout, ExpertStack, LowRankExperts, find_stack
from .lowrank import LAYERS, LowRankLinear, Storage
from .quantized import QUANTIZED, QuantizedLinear, storage_with

Dense: TypeAlias = nn.Linear | Conv1D | ExpertStack
Replaced: TypeAlias = LowRankLinear | QuantizedLinear | LowRankExperts


def find_dense(model: nn.Module, name: str) -> Dense | None:
    """Return the dense layer of a name, or None if that is no layer that can be replaced."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return find_stack(model, name)
    return module if isinstance(module, nn.Linear | Conv1D) else None


def sizes_of(dense: Dense) -> tuple[int, int]:
    """Return m outputs and n inputs of a dense layer, or of one expert of a stack."""
    if isinstance(dense, ExpertStack):
        return dense.sizes[1:]
    if isinstance(dense, nn.Linear):
        return dense.out_features, dense.in_features
    inputs, outputs = dense.weight.shape
    return outputs, inputs


def set_layer(model: nn.Module, name: str, layer: nn.Module | nn.Parameter) -> None:
    """Put a module or a parameter in the place of another."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(getattr(owner, leaf), nn.Module) != isinstance(layer, nn.Module):
        delattr(owner, leaf)  # a parameter cannot be replaced by a module otherwise
    setattr(owner, leaf, layer)  # in place: the order of an nn.Sequential counts


def low_rank_stack(
    stack: ExpertStack, name: str, rank: int, layout: ExpertLayout
) -> LowRankExperts:
    """Return the layer that replaces a stack of experts, with the same device and dtype."""
    weight, transposed = stack
    return LowRankExperts(
        stack.sizes, rank, layout, transposed, name, device=weight.device, dtype=weight.dtype
    )


def replacement(
    dense: nn.Linear | Conv1D,
    rank: int | None,
    storage: Storage,
    bits: int | None,
    group_size: int,
) -> nn.Module:
    """Return the layer that replaces a dense one, with the same sizes, device and dtype.

    Args:
        dense: the dense layer.
        rank: its rank; None if it is only quantized.
        storage: storage of low-rank layers.
        bits: 8 or 4; None if it is not quantized.
        group_size: columns per scale with 4 bits.
    """
    outputs, inputs = sizes_of(dense)
    like: dict[str, Any] = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": dense.bias is not None,
        "device": dense.weight.device,
        "dtype": dense.weight.dtype,
    }
    if rank is not None:
        like["rank"] = rank
    if bits is not None:
        like |= {"bits": bits, "group_size": group_size}
    layers = LAYERS if bits is None else QUANTIZED
    kind = QuantizedLinear if rank is None else layers[storage_with(bits, storage)]
    layer = cast(Replaced, kind(**like))
    if isinstance(dense, Conv1D):
        layer.conv1d = type(dense)
    return layer.train(dense.training)


def dense_form(layer: Replaced, dtype: torch.dtype | None) -> nn.Module | nn.Parameter:
    """Return what a layer replaced: a dense layer or a stacked parameter with equal products.

    Args:
        layer: a low-rank or quantized layer.
        dtype: of the result; by default that of the layer.
    """
    with torch.no_grad():
        weight = nn.Parameter(layer.dense_weight(dtype), layer.weight.requires_grad)
        if isinstance(layer, LowRankExperts):
            return weight
        bias = None
        if layer.bias is not None:
            bias = nn.Parameter(layer.bias.detach().to(dtype), layer.bias.requires_grad)
    return dense_layer(weight, bias, layer.conv1d).train(layer.training)


def dense_layer(
    weight: Tensor, bias: Tensor | None, conv1d: type[nn.Module] | None = None
) -> nn.Module:
    """Return a dense layer with the given tensors, trainable as they are.

    Args:
        weight: ``[m, n]``.
        bias: ``[m]``, or None; a ``Conv1D`` always has one.
        conv1d: class to use instead of ``nn.Linear``.
    """
    outputs, inputs = weight.shape
    dense: Any
    with torch.device("meta"):
        has_bias = bias is not None
        dense = conv1d(outputs, inputs) if conv1d else nn.Linear(inputs, outputs, has_bias)
    needed = weight.requires_grad
    dense.weight = nn.Parameter(weight.detach().T.contiguous() if conv1d else weight, needed)
    if bias is not None:
        dense.bias = nn.Parameter(bias, bias.requires_grad)
    return cast(nn.Module, dense)
