"""Dobi-SVD: truncation positions learned by gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.references.common import Ranks, Study, Sublayer, Weights, bisect, snapped

STEPS = 40
BATCH = 4
LEARNING_RATE = 0.01
SOFTNESS = 0.02


def dobi_svd(study: Study, ratio: float) -> Weights:
    """Dobi-SVD (arXiv 2502.02723), first stage: learned positions; no remapped store.

    The output y of each sublayer is truncated softly in the basis of its principal components
    (eigenvectors of Σ y yᵀ; the paper decomposes each sample's output anew and finds this common
    basis by incremental PCA afterwards). The loss is KL to the dense model on calibration text
    (the paper: the perplexity itself). The budget is kept after each step (the paper: by a penalty
    on the ratio): the gradient loses its part along that of the budget, and after Adam's step all
    positions are scaled to the budget. Start: uniform. 40 steps of 0.01 of the full rank, an edge
    0.02 of it wide (the paper: 5120 steps on a 7B model, an edge of 0.1 ranks).
    """
    positions = _Positions(study, ratio)
    optimizer = torch.optim.Adam([positions.shares], lr=LEARNING_RATE)
    with torch.no_grad():
        dense = study.dense_log_probabilities
    study.model.requires_grad_(False)
    hooks = [
        s.linear.register_forward_hook(positions.truncation(i))
        for i, s in enumerate(study.sublayers)
    ]
    try:
        for step in range(STEPS):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(study.windows)
            optimizer.zero_grad()
            other = study.log_probabilities(study.windows[rows])
            (dense[rows].exp() * (dense[rows] - other)).sum(-1).mean().backward()
            positions.turn_gradient_along_budget()
            optimizer.step()
            positions.scale_to_budget()
    finally:
        for hook in hooks:
            hook.remove()
        study.model.requires_grad_(True)
    return study.whitened_weights(positions.ranks())


class _Positions:
    """The truncation position γ of each sublayer, as a share θ of its full rank."""

    def __init__(self, study: Study, ratio: float) -> None:
        self._sublayers = study.sublayers
        self._budget = study.budget(ratio)
        self._bases = [_principal(study, s) for s in study.sublayers]
        self._full = torch.tensor([float(min(s.shape)) for s in study.sublayers])
        self._per_rank = torch.tensor([float(s.rank_cost) for s in study.sublayers])
        self._dense = torch.tensor([float(s.dense_cost) for s in study.sublayers])
        uniform = torch.tensor([ratio * s.break_even for s in study.sublayers])
        self.shares = (uniform / self._full).requires_grad_()

    def truncation(self, number: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        """Return a hook that keeps component i of an output by ½ tanh((γ − i)/width) + ½."""
        basis, full = self._bases[number], self._full[number]
        index = torch.arange(1, int(full) + 1)

        def truncate(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            edge = (self.shares[number] * full - index) / (SOFTNESS * full)
            return (output @ basis * (0.5 * torch.tanh(edge) + 0.5)) @ basis.T

        return truncate

    def _spent(self, shares: Tensor) -> Tensor:
        """Parameters: γ(m+n) of each sublayer, at most mn."""
        return torch.minimum(shares * self._full * self._per_rank, self._dense).sum()

    def turn_gradient_along_budget(self) -> None:
        """Take the part along the budget's own gradient out of the gradient of the shares."""
        (across,) = torch.autograd.grad(self._spent(self.shares), self.shares)
        gradient = self.shares.grad
        assert gradient is not None
        self.shares.grad = gradient - (gradient @ across) / (across @ across) * across

    @torch.no_grad()
    def scale_to_budget(self) -> None:
        """Multiply all shares by the one factor that meets the budget."""
        scale = bisect(
            lambda x: float(self._spent((x * self.shares).clamp(0, 1))), float(self._budget)
        )
        self.shares.copy_((scale * self.shares).clamp(0, 1))

    def ranks(self) -> Ranks:
        """Round down, then up again in the order of what was lost, while the budget lasts."""
        exact = (self.shares.detach() * self._full).tolist()
        ranks = {s.name: snapped(s, r) for s, r in zip(self._sublayers, exact, strict=True)}
        left = self._budget - sum(s.cost(ranks[s.name]) for s in self._sublayers)
        lost = sorted(zip(exact, self._sublayers, strict=True), key=lambda e: -(e[0] % 1))
        for _, s in lost:
            rank = ranks[s.name]
            if rank is not None and rank < s.top_rank and s.rank_cost <= left:
                ranks[s.name] = rank + 1
                left -= s.rank_cost
        return ranks


def _principal(study: Study, s: Sublayer) -> Tensor:
    """The principal components ``[m, min(m, n)]`` of the output, largest first."""
    outputs = study.inputs[s.name] @ s.weight.T
    vectors: Tensor = torch.linalg.eigh(outputs.T @ outputs).eigenvectors
    return vectors.flip(1)[:, : min(s.shape)].float()
