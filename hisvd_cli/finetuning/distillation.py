"""Losses over a vocabulary too large to hold: of a teacher's distribution, or of the next token.

Legend: T tokens, d the width of the hidden states, V the vocabulary, τ the temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hisvd_cli.modeling.divergence import kl_divergence

Head = Callable[[Tensor], Tensor]
"""Hidden states ``[T, d]`` ─► logits ``[T, V]``."""
Criterion = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits ``[t, V]`` in float32 of the tokens of a slice ─► the sum of their losses, and its
gradient ``[t, V]``. The logits may be overwritten."""

ROWS = 256
"""Tokens whose logits are held at a time, by default."""


class _Chunked(torch.autograd.Function):
    """Makes the logits of few tokens at a time, and at once the gradient that they give: neither
    is needed again, so no logits are kept for the backward pass, nor made a second time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Head, criterion: Criterion, rows: int) -> Tensor:
        """Return the sum of the losses."""
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        gradients = []
        for start in range(0, len(states), rows):
            leaf = states[start : start + rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(leaf)
            span = slice(start, start + len(leaf))
            value, gradient = criterion(logits.detach().float(), span)
            total += value
            if wanted:
                gradients.append(torch.autograd.grad(logits, leaf, gradient.to(logits.dtype))[0])
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return total.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the states; the head is not trained."""
        (states,) = ctx.saved_tensors
        return states * gradient.to(states.dtype), None, None, None


def summed_loss(states: Tensor, head: Head, criterion: Criterion, rows: int = ROWS) -> Tensor:
    """Return the sum of a criterion over tokens, in nats, without holding all of their logits.

    Args:
        states: hidden states ``[T, d]`` before the output head.
        head: the output head. Its weights get no gradient.
        criterion: the loss of logits.
        rows: tokens at a time.
    """
    total: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        states, head, criterion, rows
    )
    return total


def divergence_from(reference: Tensor, head: Head, temperature: float = 1.0) -> Criterion:
    """Return the criterion ``τ² KL(teacher ‖ student)`` of distributions at a temperature.

    The factor τ² keeps the size of gradients at any temperature (Hinton et al. 2015, arXiv
    1503.02531). Softmax is in float32, sums in float64, whatever the heads compute in.

    Args:
        reference: the teacher's hidden states ``[T, d′]``.
        head: the teacher's output head.
        temperature: τ.
    """

    def criterion(logits: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_p = head(reference[span]).float().div_(temperature).log_softmax(-1)
        log_q = logits.div_(temperature).log_softmax(-1)
        value = kl_divergence(log_p, log_q).double().sum() * temperature**2
        # d/dz of τ² KL(p ‖ softmax(z/τ)) is τ (q − p).
        return value, log_q.exp_().sub_(log_p.exp_()).mul_(temperature)

    return criterion


def likelihood_of(targets: Tensor) -> Criterion:
    """Return the criterion of the negative log-likelihood of ``targets`` ``[T]``."""

    def criterion(logits: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        log_q = logits.log_softmax(-1)
        wanted = targets[span]
        value = functional.nll_loss(log_q, wanted, reduction="none").double().sum()
        gradient = log_q.exp_()
        gradient[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
        return value, gradient

    return criterion
