"""Low-rank layers as balanced pairs in float32, the form in which they are trained.

Balanced factors (U √Σ and √Σ V of the singular value decomposition of the product) have gradients
of the same scale. Pivoted pairs train badly, since they mix rows of the product with coefficients
of another scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from hisvd_cli.linalg.pivoting import pivoted
from hisvd_cli.modeling.layers.lowrank import FACTORS, LowRankLinear, PivotedLinear, Storage


class TrainedPair(nn.Module):
    """A trainable low-rank layer ``y = U(Vx) + b``.

    Attributes:
        v: V ``[r, n]`` in float32.
        u: U ``[m, r]`` in float32.
        bias: b ``[m]``, or None.
    """

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        u, v = balanced(*_factors(layer))
        self.u = nn.Parameter(u)
        self.v = nn.Parameter(v)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``[..., n]`` to y ``[..., m]``."""
        return functional.linear(functional.linear(x, self.v), self.u, self.bias)


def _factors(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """Return U ``[m, r]`` and V ``[r, n]`` of a layer in float32."""
    v, u = layer.weight.detach().float(), layer.weight_u.detach().float()
    if isinstance(layer, PivotedLinear):
        identity = torch.eye(layer.rank, device=u.device)
        u = torch.cat([identity, u]).index_select(0, layer.weight_order)
    return u, v


def balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product that share its singular values equally.

    Args:
        u: U ``[m, r]``.
        v: V ``[r, n]``.

    Returns:
        The balanced U ``[m, r]`` and V ``[r, n]``.
    """
    left, upper = torch.linalg.qr(u)
    right, lower = torch.linalg.qr(v.T)
    a, sigma, b = torch.linalg.svd(upper @ lower.T)
    root = sigma.sqrt()
    return left @ (a * root), (root[:, None] * b) @ right.T


def open_pairs(model: nn.Module) -> dict[str, TrainedPair]:
    """Replace the low-rank layers of a model by trainable pairs, and return these by name.

    All other parameters of the model are frozen.
    """
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    pairs = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        pairs[name] = TrainedPair(layer)
        setattr(model.get_submodule(parent), child, pairs[name])
    return pairs


def stored_factors(u: Tensor, v: Tensor, storage: Storage, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer as a checkpoint stores them.

    Args:
        u: U ``[m, r]``.
        v: V ``[r, n]``.
        storage: pair or pivoted.
        dtype: dtype on disk.
    """
    made = pivoted(u.double(), v.double()) if storage == "pivoted" else (v, u)
    named: Mapping[str, Tensor] = dict(zip(FACTORS[storage], made, strict=True))
    return {
        leaf: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for leaf, tensor in named.items()
    }
