"""Token losses, and the KL divergence between the predictions of two models.

Legend: L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 128  # positions converted to float32 at a time, so that they fit the cache


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats of all tokens except the first, ``[L − 1]``.

    Args:
        logits: ``[L, V]``.
        ids: ``[L]``.
    """
    parts = [
        functional.cross_entropy(rows.float(), targets, reduction="none")
        for rows, targets in zip(logits[:-1].split(_ROWS), ids[1:].split(_ROWS), strict=True)
    ]
    return torch.cat(parts)


def token_divergences(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(reference ‖ other) in nats, and whether both models rank the same token first.

    Args:
        reference: logits of the reference ``[L, V]``.
        logits: logits of the other model ``[L, V]``.

    Returns:
        Two tensors ``[L − 1]``; the last position has no next token and is left out.
    """
    divergences, agreements = [], []
    for one, other in zip(reference[:-1].split(_ROWS), logits[:-1].split(_ROWS), strict=True):
        agreements.append(one.argmax(-1) == other.argmax(-1))
        log_p, log_q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        divergences.append(kl_divergence(log_p, log_q))
    return torch.cat(divergences), torch.cat(agreements)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) in nats of each row ``[T]``, differentiable with respect to ``log_q``.

    Args:
        log_p: log-probabilities ``[T, V]`` of the reference.
        log_q: log-probabilities ``[T, V]`` of the other model.
    """
    # In place on the difference, and out of place on the arguments: autograd needs those.
    return (log_p - log_q).mul_(log_p.exp()).sum(-1)
