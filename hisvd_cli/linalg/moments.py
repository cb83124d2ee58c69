"""Second moments of activations, accumulated over batches.

Legend: m outputs, n inputs, T tokens; G = E[x xᵀ] ``[n, n]`` of the input, M = E[y yᵀ] ``[m, m]``
of the output without its bias, M = W G Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hisvd_cli.linalg.products import gram

Side = Literal["input", "output"]
AddUp = Callable[[Tensor], None]
"""Sums a tensor over all processes, in place on the first one."""


@dataclass(frozen=True)
class Moment:
    """A second moment of a sublayer's input or output.

    Attributes:
        matrix: ``[n, n]`` (input) or ``[m, m]`` (output), symmetric, positive semidefinite.
        side: input or output.
    """

    matrix: Tensor
    side: Side

    def of_output(self, weight: Tensor) -> Tensor:
        """Return M = W G Wᵀ ``[m, m]`` in float64 for ``weight`` ``[m, n]``."""
        if self.side == "output":
            return self.matrix.double()
        wide = weight.double()
        return wide @ self.matrix.double() @ wide.T


def add_up_count(count: int, add_up: AddUp) -> int:
    """Return a count summed by ``add_up``; only valid on the first process."""
    total = torch.tensor(count)
    add_up(total)
    return int(total)


def exact_device(device: torch.device) -> torch.device:
    """Return ``device``, or the CPU if the device does not support float64 (Apple GPUs)."""
    return torch.device("cpu") if device.type == "mps" else device


class _TokenSum:
    """A sum over tokens, in float64 on a device that supports it."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._sum = torch.zeros(*shape, dtype=torch.float64, device=exact_device(device))
        self._tokens: float = 0

    def count_as(self, tokens: float) -> None:
        """Divide the sum by another number than that of the added tokens."""
        self._tokens = tokens

    def pool(self, add_up: AddUp) -> None:
        """Add up the sums of all processes, on the first one."""
        add_up(self._sum)
        self._tokens = add_up_count(int(self._tokens), add_up)

    def mean(self) -> Tensor:
        """Return the mean over all tokens, in float32 on the CPU."""
        return (self._sum / self._tokens).float().cpu()


class MomentSum(_TokenSum):
    """Running Σ x xᵀ: products in float32, summed in float64; the mean is E[x xᵀ]
    ``[width, width]``.

    Args:
        width: length of x.
        device: device of the activations; the sum is kept there if it supports float64.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__((width, width), device)

    def add(self, x: Tensor) -> None:
        """Add activations ``[..., width]``; all leading dimensions count as tokens."""
        rows = x.reshape(-1, x.shape[-1]).float()  # [T, width]
        self._sum += gram(rows.T).to(self._sum.device)
        self._tokens += rows.shape[0]


class ChannelSum(_TokenSum):
    """Running Σ|x_j| and Σ x_j² per channel: batch sums in float32, totals in float64; the mean is
    E|x_j| and E x_j² ``[2, width]``.

    Args:
        width: length of x.
        device: device of the activations.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__((2, width), device)

    def add(self, x: Tensor) -> None:
        """Add activations ``[..., width]``; all leading dimensions count as tokens."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._sum += torch.stack([rows.abs().sum(0), rows.square().sum(0)]).to(self._sum.device)
        self._tokens += rows.shape[0]
