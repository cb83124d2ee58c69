"""Shapes of sublayers: one linear layer, or a stack of experts with a common rank."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hisvd_cli.modeling.layers.lowrank import Storage

Shape = tuple[int, int] | tuple[int, int, int]
"""``(m, n)`` = (outputs, inputs) of a linear layer, or ``(E, m, n)`` of a stack of E experts, with
m and n of one expert."""


def is_stack(shape: Shape) -> bool:
    """Return whether a sublayer is a stack of experts."""
    return len(shape) == 3


def matrix_of(shape: Shape) -> tuple[int, int]:
    """Return ``(m, n)``, of one expert for a stack."""
    return shape[-2], shape[-1]


def copies(shape: Shape) -> int:
    """Return the number of matrices: E for a stack, otherwise 1."""
    return shape[0] if len(shape) == 3 else 1


def numel(shape: Shape) -> int:
    """Return the number of parameters of a dense sublayer, of all experts for a stack."""
    return prod(shape)


def storage_of(shape: Shape, storage: Storage) -> Storage:
    """Return the storage of a sublayer in a checkpoint of the given one: stacks are always plain
    pairs."""
    return "pair" if is_stack(shape) else storage


def shape_text(shape: Shape) -> str:
    """Return ``m×n``, or ``E × (m×n)`` for a stack."""
    text = "×".join(map(str, matrix_of(shape)))
    return f"{copies(shape)} × ({text})" if is_stack(shape) else text


def copies_used(shape: Shape, experts_per_token: int | None) -> int:
    """Return how many matrices of a sublayer one token passes.

    Args:
        shape: the shape of the sublayer.
        experts_per_token: experts per token and stack; None if unknown, which counts all experts.
    """
    count = copies(shape)
    return count if experts_per_token is None else min(count, experts_per_token)


def active_parameters(
    total: int, stacks: Iterable[tuple[Shape, int]], experts_per_token: int | None
) -> int | None:
    """Return the number of parameters that one token uses; None if it is unknown.

    Args:
        total: parameters of the model.
        stacks: shape of each stack, and its parameters as stored, the same number for each expert.
        experts_per_token: experts per token and stack; None if unknown.
    """
    if experts_per_token is None:
        return None
    idle = (
        held // copies(shape) * (copies(shape) - copies_used(shape, experts_per_token))
        for shape, held in stacks
    )
    return total - sum(idle)
