"""Statistics of the experts of a mixture, each from the tokens that were routed to it.

The output of an expert is multiplied by the router's probability p of each token. Its error counts
in the same way, so that inputs are weighted: G = Σ p² x xᵀ / T. T counts all tokens of the text, so
that the losses of experts and of other layers can be added. Gradients at the output contain p
already; H = Σ g gᵀ / Σ p² makes ``tr(H Δ G Δᵀ)`` the loss per token of the text.

Legend: E experts; n inputs of each; R tokens routed to one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hisvd_cli.linalg.moments import AddUp
from hisvd_cli.modeling.structure.expert_linears import Routed
from hisvd_cli.modeling.structure.sublayers import Sublayer

_ENOUGH = 2
"""An expert with fewer tokens than this multiple of its width shares the moments of its stack."""


def routed(module: nn.Module) -> Routed | None:
    """Return which tokens the input of an expert's linear layer consists of; None for others."""
    found: Routed | None = getattr(module, "routed", None)
    return found


def weighted(module: nn.Module, x: Tensor) -> Tensor:
    """Return inputs ``[…, n]``; those of an expert are multiplied by the router's probabilities."""
    rows = routed(module)
    return x if rows is None else x * rows.weights.to(x.dtype)[:, None]


@dataclass
class Hits:
    """Counts of the tokens of one expert: their number, and the sum of p²."""

    tokens: int = 0
    squares: float = 0.0

    def add(self, module: nn.Module, x: Tensor, keep: Tensor | None = None) -> None:
        """Count the rows of an input ``[R, n]``, or those in the mask ``keep``."""
        rows = routed(module)
        if rows is None:  # computed for all tokens, weighted before
            self.tokens += int((x.reshape(-1, x.shape[-1]) != 0).any(-1).sum())
            self.squares = float(self.tokens)
            return
        weights = rows.weights if keep is None else rows.weights[keep]
        self.tokens += len(weights)
        self.squares += float(weights.float().square().sum())

    def pool(self, add_up: AddUp) -> None:
        """Add the counts of the other processes on the first process."""
        both = torch.tensor([self.tokens, self.squares], dtype=torch.float64)
        add_up(both)
        self.tokens, self.squares = int(both[0]), float(both[1])


def stacks_among(sublayers: Sequence[Sublayer]) -> dict[str, list[str]]:
    """Return stack → its members, for the stacks of experts among sublayers."""
    return {s.name: s.members for s in sublayers if len(s.shape) > 2}


def pooled(
    means: Sequence[Tensor], hits: Sequence[int], width: int, per_token: bool = False
) -> list[Tensor]:
    """Return the moments of a stack's experts, those from few tokens replaced in part.

    With R tokens for a width of n, the share ``max(0, 1 − R / 2n)`` of a moment is that of all
    experts together. Moments over all tokens of the text are scaled to the expert's own number of
    tokens (at least half a one), and moments per token of the expert are averaged.

    Args:
        means: moments of the experts.
        hits: number of tokens of each.
        width: n.
        per_token: whether moments are per token of the expert.
    """
    count = max(sum(hits), 1)
    weights = [own / count if per_token else 1 / count for own in hits]
    common = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    found = []
    for mean, own in zip(means, hits, strict=True):
        share = max(0.0, 1 - own / (_ENOUGH * width))
        if share and sum(hits):
            mean = (1 - share) * mean + share * (1 if per_token else max(own, 0.5)) * common
        found.append(mean)
    return found


def pool_stacks(
    means: dict[str, Tensor],
    stacks: Mapping[str, Sequence[str]],
    hits: Mapping[str, int],
    end: str,
    widths: Mapping[str, int] | None = None,
) -> None:
    """Apply :func:`pooled` to the moments ``member.end`` of every stack, in place.

    Args:
        means: the moments.
        stacks: stack → its members.
        hits: member → number of tokens.
        end: which moments.
        widths: member → width; for moments per token. By default, that of a moment over all tokens.
    """
    for members in stacks.values():
        keys = [f"{member}.{end}" for member in members]
        if all(key in means for key in keys):
            width = widths[members[0]] if widths else len(means[keys[0]])
            counts = [hits[member] for member in members]
            made = pooled([means[key] for key in keys], counts, width, widths is not None)
            means.update(zip(keys, made, strict=True))
