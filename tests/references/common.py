"""What the references share: the whole model in memory, its activations and gradients, ranks.

Nothing here is streamed, cached on disk or clever, and nothing comes from ``hisvd_cli``: the model
is loaded whole in float32, every activation of the calibration windows stays in memory, matrices
are decomposed dense in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, Tensor]
Ranks = dict[str, int | None]
"""Rank by sublayer; None leaves it dense."""


@dataclass
class Sublayer:
    """A linear layer of a decoder block.

    Attributes:
        name: its full name.
        linear: the module.
        block: number of its decoder block.
        kind: last part of its name, such as ``q_proj``.
    """

    name: str
    linear: nn.Linear
    block: int
    kind: str

    @cached_property
    def weight(self) -> Tensor:
        """The weight ``[m, n]`` in float64, as it was at the first look."""
        return self.linear.weight.detach().double().clone()

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs m and inputs n."""
        return self.linear.out_features, self.linear.in_features

    @property
    def dense_cost(self) -> int:
        """Parameters as it is: mn."""
        return math.prod(self.shape)

    @property
    def rank_cost(self) -> int:
        """Parameters of one rank: m + n."""
        return sum(self.shape)

    @property
    def break_even(self) -> float:
        """The rank mn/(m+n) at which a pair costs as much as the weight."""
        return self.dense_cost / self.rank_cost

    @property
    def top_rank(self) -> int:
        """The largest rank that still saves something."""
        return math.ceil(self.break_even) - 1

    def cost(self, rank: int | None) -> int:
        """Parameters at a rank."""
        return self.dense_cost if rank is None else rank * self.rank_cost

    def pivoted_cost(self, rank: int | None) -> int:
        """Parameters at a rank, of r rows ``[r, n]``, what makes the others ``[m − r, r]``, and m
        places."""
        m, n = self.shape
        return self.dense_cost if rank is None else rank * n + (m - rank) * rank + m


class Study:
    """A model, its calibration windows ``[S, L]``, and what is measured with them, once each."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model = model.eval()
        self.windows = windows
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        self.blocks: list[nn.Module] = list(blocks)
        names = {module: name for name, module in model.named_modules()}
        self.sublayers = [
            Sublayer(names[module], module, number, names[module].rpartition(".")[2])
            for number, block in enumerate(blocks)
            for module in block.modules()
            if isinstance(module, nn.Linear)
        ]

    def budget(self, ratio: float) -> int:
        """Parameters that a keep ratio allows."""
        return int(ratio * sum(s.dense_cost for s in self.sublayers))

    def by_kind(self) -> dict[str, list[Sublayer]]:
        """Sublayers by type."""
        kinds: dict[str, list[Sublayer]] = {}
        for sublayer in self.sublayers:
            kinds.setdefault(sublayer.kind, []).append(sublayer)
        return kinds

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs of each sublayer ``[S·L, n]``, float64."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
                seen[name] = arguments[0].detach().flatten(0, 1).double()

            return hook

        handles = [s.linear.register_forward_hook(keep(s.name)) for s in self.sublayers]
        with torch.no_grad():
            self.model(self.windows, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    @cached_property
    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One backward pass per window: gradients at outputs, and gradients of weights."""
        at_outputs: dict[str, list[Tensor]] = {s.name: [] for s in self.sublayers}
        of_weights: dict[str, list[Tensor]] = {s.name: [] for s in self.sublayers}

        def keep(name: str) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, _inputs: object, gradients: tuple[Tensor, ...]) -> None:
                at_outputs[name].append(gradients[0].detach()[0].double())

            return hook

        handles = [s.linear.register_full_backward_hook(keep(s.name)) for s in self.sublayers]
        for window in self.windows:
            self.model.zero_grad(set_to_none=True)
            logits = self.model(window[None], use_cache=False).logits[0]
            nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
            for s in self.sublayers:
                assert s.linear.weight.grad is not None
                of_weights[s.name].append(s.linear.weight.grad.detach().double().clone())
        self.model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        return (
            {name: torch.cat(parts) for name, parts in at_outputs.items()},
            {name: torch.stack(parts) for name, parts in of_weights.items()},
        )

    @property
    def output_gradients(self) -> dict[str, Tensor]:
        """Gradient of the loss (cross-entropy summed over tokens) at outputs ``[S·L, m]``."""
        return self._gradients[0]

    @property
    def weight_gradients(self) -> dict[str, Tensor]:
        """Gradient of each window's loss by each weight ``[S, m, n]``."""
        return self._gradients[1]

    @cached_property
    def cholesky_of_inputs(self) -> dict[str, Tensor]:
        """S with S Sᵀ = Σ x xᵀ by sublayer ``[n, n]``, a sum over tokens."""
        return {name: cholesky(x.T @ x) for name, x in self.inputs.items()}

    @cached_property
    def whitened(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """The decomposition U, σ, Vᵀ of W S by sublayer."""
        return {s.name: svd(s.weight @ self.cholesky_of_inputs[s.name]) for s in self.sublayers}

    def whitened_weights(self, ranks: Ranks) -> Weights:
        """SVD-LLM's truncation: W′ = U_k Σ_k V_kᵀ S⁻¹."""
        return {
            s.name: head(self.whitened[s.name], rank) @ inverse(self.cholesky_of_inputs[s.name])
            for s in self.sublayers
            if (rank := ranks[s.name]) is not None
        }

    @cached_property
    def dense_log_probabilities(self) -> Tensor:
        """What the dense model predicts of the calibration windows ``[S, L, vocabulary]``."""
        return self.log_probabilities(self.windows).detach()

    def log_probabilities(self, windows: Tensor) -> Tensor:
        """Log probabilities ``[S, L, vocabulary]``, with whatever weights the model has now."""
        logits: Tensor = self.model(windows, use_cache=False).logits
        return logits.log_softmax(-1)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
        """The model with some of its weights replaced, while the context lasts."""
        touched = [s for s in self.sublayers if s.name in weights]
        before = [s.linear.weight.data for s in touched]
        try:
            for s in touched:
                s.linear.weight.data = weights[s.name].to(before[0].dtype)
            yield self.model
        finally:
            for s, weight in zip(touched, before, strict=True):
                s.linear.weight.data = weight

    @torch.no_grad()
    def perplexity(self, windows: Tensor, weights: Mapping[str, Tensor] | None = None) -> float:
        """Perplexity over windows ``[S, L]`` with some weights replaced."""
        with self.with_weights(weights or {}):
            predicted = self.log_probabilities(windows)[:, :-1]
        of_next = predicted.gather(-1, windows[:, 1:, None])
        return math.exp(-float(of_next.double().mean()))


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of a matrix."""
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, sigma, v


def head(parts: tuple[Tensor, Tensor, Tensor], rank: int) -> Tensor:
    """The best approximation of a rank: U_k Σ_k V_kᵀ."""
    u, sigma, v = parts
    return (u[:, :rank] * sigma[:rank]) @ v[:rank]


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor; a singular matrix gets the least jitter that helps."""
    scale = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    for jitter in (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * scale * identity)
        if not failed:
            return factor
    raise ValueError("no positive definite matrix")


def inverse(matrix: Tensor) -> Tensor:
    """The inverse of a matrix."""
    found: Tensor = torch.linalg.inv(matrix)
    return found


def shrunk(matrix: Tensor, share: float) -> Tensor:
    """Move a second moment towards its mean diagonal: (1 − share)·M + share·mean(diag M)·I."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return (1 - share) * matrix + share * matrix.diagonal().mean() * identity


def tails(sigma: Tensor) -> list[float]:
    """Discarded energy Σ_{j>k} σ_j² at each rank k from 0 to full."""
    energy = sigma.double() ** 2
    discarded = energy.sum() - torch.cat([torch.zeros(1, dtype=torch.float64), energy.cumsum(0)])
    values: list[float] = discarded.clamp_min(0).tolist()
    return values


def uniform_ranks(study: Study, ratio: float) -> Ranks:
    """The same share everywhere: r = floor(ratio·mn/(m+n))."""
    return {s.name: int(ratio * s.break_even + 1e-9) for s in study.sublayers}


def snapped(sublayer: Sublayer, rank: float) -> int | None:
    """Round a rank down; one that saves nothing means dense."""
    return None if rank >= sublayer.break_even - 1e-9 else max(int(rank + 1e-9), 1)


def knapsack(
    study: Study,
    losses: Mapping[str, Mapping[int | None, float]],
    budget: int,
    price: Callable[[Sublayer, int | None], int] = Sublayer.cost,
    least_unit: int = 1,
) -> Ranks:
    """Choose one rank per sublayer with the least sum of losses, by dynamic programming.

    Args:
        study: gives the sublayers.
        losses: the choices of each sublayer and what each loses.
        budget: parameters that may be spent.
        price: parameters of a sublayer at a rank.
        least_unit: costs are rounded up to a multiple of the larger of this and their common
            divisor; exact where it is 1.
    """
    common = reduce(math.gcd, (price(s, r) for s in study.sublayers for r in losses[s.name]))
    unit = max(common, least_unit)
    room = budget // unit
    best = np.zeros(room + 1)
    taken: list[np.ndarray] = []
    for s in study.sublayers:
        reached = np.full(room + 1, np.inf)
        choice = np.zeros(room + 1, dtype=np.int32)
        for number, (rank, loss) in enumerate(losses[s.name].items()):
            cost = -(-price(s, rank) // unit)
            if cost > room:
                continue
            offer = best[: room + 1 - cost] + loss
            better = offer < reached[cost:]
            reached[cost:][better] = offer[better]
            choice[cost:][better] = number
        best = reached
        taken.append(choice)
    left = room
    ranks: Ranks = {}
    for s, choice in zip(reversed(study.sublayers), reversed(taken), strict=True):
        ranks[s.name] = list(losses[s.name])[choice[left]]
        left -= -(-price(s, ranks[s.name]) // unit)
    return ranks


def fill(study: Study, ranks: Ranks, energies: Mapping[str, Sequence[float]], budget: int) -> Ranks:
    """Spend what is left of a budget, each time on the step with most loss avoided per parameter.

    A step is one rank more, or from the largest rank to dense. ``energies`` are discarded energies
    by rank.
    """
    ranks = dict(ranks)
    left = budget - sum(s.cost(ranks[s.name]) for s in study.sublayers)
    while True:
        best: tuple[float, Sublayer, int | None] | None = None
        for s in study.sublayers:
            rank = ranks[s.name]
            if rank is None:
                continue
            wider = rank + 1 if rank < s.top_rank else None
            price = s.cost(wider) - s.cost(rank)
            saved = energies[s.name][rank] - (0.0 if wider is None else energies[s.name][wider])
            if price <= left and (best is None or saved / max(price, 1) > best[0]):
                best = saved / max(price, 1), s, wider
        if best is None:
            return ranks
        _, s, wider = best
        left -= s.cost(wider) - s.cost(ranks[s.name])
        ranks[s.name] = wider


def bisect(spent: Callable[[float], float], target: float) -> float:
    """Return the largest x ≥ 0 with spent(x) ≤ target, of a function that does not fall."""
    low, high = 0.0, 1.0
    while spent(high) < target and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= target else (low, middle)
    return low
