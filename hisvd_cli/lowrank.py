"""The low-rank layer: two thin matrices in the place of one ``nn.Linear``.

This file travels with every checkpoint (see ``transformers_plugin.remote_code_files``), so it
imports torch and nothing else.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product: ``y = U(Vx) + b``.

    V is stored under the name ``weight``, so that a loader which knows nothing of this layer stops
    at a shape mismatch; any other name would leave its dense ``weight`` random and only warn.

    Attributes:
        weight: V, ``[rank, in_features]``.
        weight_u: U, ``[out_features, rank]``.
        bias: b, ``[out_features]``, or None.

    Args:
        in_features: n, the size of x.
        out_features: m, the size of y.
        rank: r, at least 1.
        bias: whether to add b.
        device: of the new tensors, as in ``nn.Linear``.
        dtype: of the new tensors, as in ``nn.Linear``.

    Raises:
        ValueError: the rank is below 1.
    """

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
            raise ValueError(f"The rank of a low-rank layer must be at least 1, and is {rank}.")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.weight_u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_factors(cls, u: Tensor, v: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Wrap given factors, without copying them.

        Args:
            u: U, ``[m, r]``.
            v: V, ``[r, n]``.
            bias: b, ``[m]``, or None.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        fits = u.dim() == 2 and v.dim() == 2 and u.shape[1] == v.shape[0]
        if not fits or (bias is not None and bias.shape != u.shape[:1]):
            shapes = f"U {list(u.shape)}, V {list(v.shape)}"
            shapes += "" if bias is None else f", bias {list(bias.shape)}"
            raise ValueError(f"Factors that do not fit each other: {shapes}.")
        (m, rank), n = u.shape, v.shape[1]
        layer = cls(n, m, rank, bias is not None, device="meta")  # no memory for what is replaced
        layer.weight = nn.Parameter(v.detach())
        layer.weight_u = nn.Parameter(u.detach())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    def reset_parameters(self) -> None:
        """Fill the tensors at random, with ``nn.Linear``'s bounds for either factor."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.weight_u, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``[..., in_features]`` to y ``[..., out_features]``."""
        return F.linear(F.linear(x, self.weight), self.weight_u, self.bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``U @ V`` ``[out_features, in_features]``.

        The product is taken in float32 at least, and rounded once.

        Args:
            dtype: of the result; None gives the layer's own.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight_u.to(wide) @ self.weight.to(wide)).to(dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, with its rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
