"""Running sums of gradients: squared entries, and weight gradients of whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hisvd_cli.linalg.moments import AddUp, add_up_count


class MeanSquare:
    """Running mean of all squared entries."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count: float = 0

    def count_as(self, entries: float) -> None:
        """Divide the sum by another number than that of the added entries."""
        self._count = entries

    def add(self, values: Tensor) -> None:
        """Add entries of any shape."""
        self._sum += float(values.float().square().sum())
        self._count += values.numel()

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of the other processes on the first process."""
        total = torch.tensor(self._sum, dtype=torch.float64)
        add_up(total)
        self._sum = float(total)
        self._count = add_up_count(int(self._count), add_up)

    def mean(self) -> Tensor:
        """Return the mean ``[]`` in float32."""
        return torch.tensor(self._sum / (self._count or 1), dtype=torch.float32)


class WeightSum:
    """Running sums over sequences of D = Σ_t g xᵀ ``[m, n]``, D Dᵀ and Dᵀ D, in float32.

    Args:
        linear: the layer.
        device: where sums are kept.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        m, n = linear.out_features, linear.in_features
        self._mean = torch.zeros(m, n, device=device)
        self._output = torch.zeros(m, m, device=device)
        self._input = torch.zeros(n, n, device=device)
        self._sequences = 0

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add inputs ``[S, L, n]`` and gradients ``[S, L, m]`` at the outputs."""
        for inputs, gradients in zip(x.float(), gradient.float(), strict=True):
            whole = gradients.T @ inputs
            self._mean += whole
            self._output += whole @ whole.T
            self._input += whole.T @ whole
            self._sequences += 1

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of the other processes on the first process."""
        for total in (self._mean, self._output, self._input):
            add_up(total)
        self._sequences = add_up_count(self._sequences, add_up)

    def means(self) -> dict[str, Tensor]:
        """Return the means by field of ``WeightGradients``, in float32 on the CPU."""
        sums = {"mean": self._mean, "output": self._output, "input": self._input}
        return {part: (total / self._sequences).cpu() for part, total in sums.items()}
