"""Records the arguments that a model passes to its blocks, with stubs in place of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class DivertedError(Exception):
    """A block did not receive the output of the block before it."""


def run_stubs(
    model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor, as_tuple: bool
) -> tuple[Tensor, list[Arguments]]:
    """Return the first block's input, and the other arguments of each block.

    Raises:
        DivertedError: a block received another hidden state.
    """
    calls: list[Arguments] = []
    states: list[Tensor] = []

    def stub(index: int, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        state = args[0] if args else kwargs.pop("hidden_states", None)
        known = states[0] if states else state
        if not isinstance(state, Tensor) or state is not known or index != len(calls):
            raise DivertedError
        states.append(state)
        calls.append((args[1:], kwargs))
        return (state,) if as_tuple else state

    with stubbed(layers, stub):
        model.get_decoder()(input_ids=ids, use_cache=False)
    if len(calls) != len(layers):
        raise DivertedError
    return states[0], calls


@contextmanager
def stubbed(layers: nn.ModuleList, stub: Callable[..., Tensor | tuple[Tensor]]) -> Iterator[None]:
    """Replace the forward method of every block with ``stub(index, …)`` for the body."""
    for index, layer in enumerate(layers):
        layer.forward = partial(stub, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def same_arguments(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    """Return whether the arguments of two calls are equal; shared masks are compared once."""
    if one is other or (id(one), id(other)) in seen:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, list | tuple):
        same = len(one) == len(other) and all(map(partial(same_arguments, seen=seen), one, other))
    elif isinstance(one, dict):
        same = one.keys() == other.keys() and all(
            same_arguments(one[k], other[k], seen) for k in one
        )
    else:
        same = bool(one == other)
    if same:
        seen.add((id(one), id(other)))
    return same
