"""Second moments of what flows through a sublayer, accumulated as a stream.

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
"""Sums a tensor over all processes into that of the first, in place."""


@dataclass(frozen=True)
class Moment:
    """A second moment, of a sublayer's input or of its output.

    Attributes:
        matrix: ``[n, n]`` (input) or ``[m, m]`` (output), symmetric, positive semidefinite.
        side: which of the two it is.
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
    """Return a count summed by ``add_up``; it means something on the first process."""
    total = torch.tensor(count)
    add_up(total)
    return int(total)


def exact_device(device: torch.device) -> torch.device:
    """Return ``device``, or the CPU where it has no float64 (Apple's GPUs)."""
    return torch.device("cpu") if device.type == "mps" else device


class MomentSum:
    """Running Σ x xᵀ: products in float32, their sum in float64.

    Args:
        width: length of x.
        device: where activations come from; the sum stays there if it has float64.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        home = exact_device(device)
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=home)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add activations ``[..., width]``; all leading dimensions count as tokens."""
        rows = x.reshape(-1, x.shape[-1]).float()  # [T, width]
        self._sum += gram(rows.T).to(self._sum.device)
        self._tokens += rows.shape[0]

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        add_up(self._sum)
        self._tokens = add_up_count(self._tokens, add_up)

    def mean(self) -> Tensor:
        """Return E[x xᵀ] ``[width, width]`` in float32 on the CPU."""
        return (self._sum / self._tokens).float().cpu()


class ChannelSum:
    """Running Σ|x_j| and Σ x_j² of each channel: products in float32, their sum in float64.

    Args:
        width: length of x.
        device: where activations come from.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(2, width, dtype=torch.float64, device=exact_device(device))
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add activations ``[..., width]``; all leading dimensions count as tokens."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._sum += torch.stack([rows.abs().sum(0), rows.square().sum(0)]).to(self._sum.device)
        self._tokens += rows.shape[0]

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        add_up(self._sum)
        self._tokens = add_up_count(self._tokens, add_up)

    def mean(self) -> Tensor:
        """Return E|x_j| and E x_j² ``[2, width]`` in float32 on the CPU."""
        return (self._sum / self._tokens).float().cpu()
