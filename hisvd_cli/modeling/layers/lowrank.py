"""Low-rank layers: two factors in place of one ``nn.Linear``, in one of two storages.

``pair`` stores U and V. ``pivoted`` stores r rows of the product U V and the coefficients of the
other rows: r² − m values fewer for the same product (pivoting factorization, Zhao et al. 2025,
arXiv 2501.19090).

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

Storage = Literal["pair", "pivoted"]

FACTORS: dict[str, tuple[str, ...]] = {
    "pair": ("weight", "weight_u"),
    "pivoted": ("weight", "weight_u", "weight_order"),
}
"""Storage → names of a layer's tensors, without the bias."""

# Extra multiplications per output that are assumed to cost no more than permuting the outputs.
# Relative time of multiplying, measured on one AVX-512 core with 128 tokens: with 52 per output
# (m 1536, r 284) 0.76 in bfloat16 and 1.18 in float32; with 187 (m 576, r 328) 1.00 and 1.31; with
# 19 (m 576, r 104) 0.59 and 1.01.
_MULTIPLICATIONS = 64


def factor_shapes(
    storage: Storage, out_features: int, in_features: int, rank: int
) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the tensors that replace a weight ``[out_features, in_features]``."""
    made = out_features - rank if storage == "pivoted" else out_features
    shapes = ((rank, in_features), (made, rank), (out_features,))
    return dict(zip(FACTORS[storage], shapes, strict=False))


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product: ``y = U(Vx) + b``.

    V is stored under the name ``weight``, so that a loader without support for this layer stops at
    a shape mismatch; under any other name it would only warn and leave ``weight`` random.

    Attributes:
        weight: V, ``[rank, in_features]``.
        weight_u: U, ``[out_features, rank]``.
        bias: b, ``[out_features]``, or None.
        conv1d: class of the dense layer if that is not an ``nn.Linear`` but transformers'
            ``Conv1D``, whose weight is ``[in_features, out_features]``.

    Args:
        in_features: n, the size of x.
        out_features: m, the size of y.
        rank: r, at least 1.
        bias: whether to add b.
        device: of the new tensors, as in ``nn.Linear``.
        dtype: of the new tensors, as in ``nn.Linear``.

    Raises:
        ValueError: the rank is below 1, or as large as ``out_features`` in pivoted storage.
    """

    storage: Storage = "pair"
    conv1d: type[nn.Module] | None = None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"The rank of a low-rank layer must be at least 1, not {rank}.")
        if self.storage == "pivoted" and rank >= out_features:
            raise ValueError(
                f"The rank of a pivoted layer must be less than its {out_features} outputs, not "
                f"{rank}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        shapes = factor_shapes(self.storage, out_features, in_features, rank)
        self.weight = nn.Parameter(torch.empty(shapes["weight"], device=device, dtype=dtype))
        self.weight_u = nn.Parameter(torch.empty(shapes["weight_u"], device=device, dtype=dtype))
        if "weight_order" in shapes:
            order = torch.arange(out_features, device=device, dtype=torch.int32)
            self.register_buffer("weight_order", order)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize both factors at random, with the bounds of ``nn.Linear``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.weight_u, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``[..., in_features]`` to y ``[..., out_features]``."""
        v, u = self.matrices(x.dtype)
        return F.linear(F.linear(x, v), u, self.bias)

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return V and U; quantized layers dequantize them to ``dtype``."""
        return self.weight, self.weight_u

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name → shape of the layer's tensors, without the bias."""
        return factor_shapes(self.storage, self.out_features, self.in_features, self.rank)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``U @ V`` ``[out_features, in_features]``.

        The product is computed in float32 or wider, and rounded once.

        Args:
            dtype: dtype of the result; by default that of the layer.
        """
        v, u = self.matrices()
        product = dense_product({**self.state_dict(), "weight": v, "weight_u": u})
        return product.to(dtype or v.dtype)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, with the rank added."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class PivotedLinear(LowRankLinear):
    """A low-rank layer in pivoted storage: ``y = cat(V′x, C V′x)[order] + b``.

    Attributes:
        weight: V′, r rows of the dense weight, ``[rank, in_features]``.
        weight_u: C, ``[out_features − rank, rank]``.
        weight_order: position of each output in the concatenation, ``[out_features]``, int32.
        bias: b, ``[out_features]``, or None.
    """

    storage: Storage = "pivoted"
    weight_order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``[..., in_features]`` to y ``[..., out_features]``.

        For many tokens, permuting the outputs takes as long as a product. If r² is small, the
        rows of U are permuted instead, including its r identity rows: r² more multiplications per
        token, but less time. Otherwise, wide outputs are computed and permuted as rows, and
        returned as a transposed view.
        """
        v, c = self.matrices(x.dtype)
        tokens = x.numel() // self.in_features
        if tokens > self.rank and self.rank**2 < _MULTIPLICATIONS * self.out_features:
            return F.linear(F.linear(x, v), self._whole_u(c), self.bias)
        if self.out_features <= self.in_features:
            own = F.linear(x, v)
            stacked = torch.cat([own, F.linear(own, c)], -1)
            y = stacked.index_select(-1, self.weight_order)
        else:
            columns = x.reshape(tokens, self.in_features).T
            own = v @ columns
            stacked = torch.cat([own, c @ own])
            y = stacked.index_select(0, self.weight_order).T.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _whole_u(self, c: Tensor) -> Tensor:
        """Return U ``[out_features, rank]``, for which ``y = U V′x + b``."""
        identity = torch.eye(self.rank, dtype=c.dtype, device=c.device)
        return torch.cat([identity, c]).index_select(0, self.weight_order)


LAYERS: dict[str, type[LowRankLinear]] = {c.storage: c for c in (LowRankLinear, PivotedLinear)}
"""Storage → layer."""


def is_order(order: Tensor) -> bool:
    """Return whether ``weight_order`` ``[out_features]`` is a permutation."""
    return torch.equal(order.sort().values, torch.arange(len(order)).to(order))


def dense_product(factors: Mapping[str, Tensor]) -> Tensor:
    """Return the dense weight ``[out_features, in_features]`` of factors, in float32 or wider.

    Args:
        factors: tensors by the names of :func:`factor_shapes`; others are ignored.
    """
    wide = torch.promote_types(factors["weight"].dtype, torch.float32)
    v, u = factors["weight"].to(wide), factors["weight_u"].to(wide)
    if "weight_order" not in factors:
        return u @ v
    return torch.cat([v, u @ v]).index_select(0, factors["weight_order"])
