"""Losses of a teacher's distribution or of the next token, computed in chunks of tokens.

The logits of all tokens at once would need too much memory.

Legend: T tokens, d hidden width, V vocabulary size, τ temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hisvd_cli.modeling.divergence import kl_divergence

Head = Callable[[Tensor], Tensor]
"""Maps hidden states ``[T, d]`` to logits ``[T, V]``."""
Criterion = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Maps the float32 logits ``[t, V]`` of a slice of the tokens to the sum of their losses and its
gradient ``[t, V]``. It may overwrite the logits."""

ROWS = 256
"""Default number of tokens per chunk."""


class _Chunked(torch.autograd.Function):
    """Computes logits and the gradient of the states chunk by chunk in the forward pass, so that no
    logits are kept or recomputed for the backward pass."""

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
        """Return the gradient of the states; the head gets none."""
        (states,) = ctx.saved_tensors
        return states * gradient.to(states.dtype), None, None, None


def summed_loss(states: Tensor, head: Head, criterion: Criterion, rows: int = ROWS) -> Tensor:
    """Return the sum of a criterion over tokens, in nats.

    Args:
        states: hidden states ``[T, d]`` before the output head.
        head: the output head, whose weights get no gradient.
        criterion: the loss as a function of logits.
        rows: tokens per chunk.
    """
    total: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        states, head, criterion, rows
    )
    return total


def divergence_from(reference: Tensor, head: Head, temperature: float = 1.0) -> Criterion:
    """Return the criterion ``τ² KL(teacher ‖ student)`` of distributions at temperature τ.

    The factor τ² makes the size of gradients independent of τ (Hinton et al. 2015, arXiv
    1503.02531). Softmax uses float32 and sums use float64, whatever the dtype of the heads.

    Args:
        reference: hidden states ``[T, d′]`` of the teacher.
        head: output head of the teacher.
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
