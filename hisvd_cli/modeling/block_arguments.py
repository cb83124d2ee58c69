"""Records the arguments that a model passes to its blocks, with stubs in place of the blocks.

Legend: B sequences of L tokens in a batch; hidden states ``[B, L, d]``, or ``[A, B, L, d]`` in
models with A parallel streams, which are kept as ``[B, A, L, d]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hisvd_cli.utils.errors import UnsupportedModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Calls = dict[int, Arguments]
"""Block → its arguments besides the hidden states."""
FORMS = (0, 1, 2, 3)
"""What blocks return: the hidden states, or a tuple of so many elements that begins with them."""


@dataclass(frozen=True)
class Passed:
    """Stands for a further output of a block, as an argument of a later one.

    Attributes:
        block: the block that returned it.
        place: its place in the tuple.
    """

    block: int
    place: int


class DivertedError(Exception):
    """A block did not receive the output of the block before it."""


class Recording:
    """The arguments of every block for every batch of a text.

    Arguments that do not depend on the text, such as masks and rotary embeddings, are kept once per
    batch size. Others, such as per-layer embeddings, are kept on the CPU for each batch.

    Args:
        decoder: the module that runs the blocks.
        layers: the blocks.
        name: of the model's class, for errors.

    Attributes:
        carries: whether blocks pass more than hidden states on, such as keys and values.
    """

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList, name: str) -> None:
        self._decoder = decoder
        self._layers = layers
        self._name = name
        self._form = 0
        self._batch_dim = 0
        self._common: dict[int, Calls] = {}
        self._own: dict[int, Calls] = {}
        self._passed: dict[int, dict[Passed, Any]] = {}
        self.carries = False

    def record(self, ids: Tensor, start: int) -> Tensor:
        """Record the arguments for a batch, and return the first block's input, batch first.

        Args:
            ids: tokens ``[B, L]``.
            start: index of its first sequence.

        Raises:
            UnsupportedModelError: the model does more between its blocks than pass states on.
        """
        state, calls = self._run(ids)
        self._batch_dim = _batch_dim(state.shape, *ids.shape)
        given = [value for _, kwargs in calls.values() for value in kwargs.values()]
        self.carries |= any(_is_carrier(value) or isinstance(value, Passed) for value in given)
        common = self._common.setdefault(len(ids), calls)
        if self.carries or not same_arguments(calls, common, set()):
            self._own[start] = _apart(calls, common, {})
        return self.to_rows(state)

    def of(self, index: int, start: int, count: int, device: torch.device) -> Arguments | None:
        """Return the arguments of a block; None if the model does not run it on text.

        Args:
            index: the block.
            start: index of the first sequence of the batch.
            count: number of sequences.
            device: device of the arguments.
        """
        calls = self._own.get(start, self._common[count])
        found: Arguments | None = _moved(calls.get(index), device, self._passed.get(start, {}))
        return found

    def keep(self, index: int, start: int, output: Any) -> Tensor:
        """Return the hidden states of a block's output, batch first, and keep what else it passes
        on.

        Args:
            index: the block.
            start: index of the first sequence of the batch.
            output: what the block returned.
        """
        if not isinstance(output, tuple | list):
            return self.to_rows(output)
        if self.carries:
            further = {Passed(index, i): each for i, each in enumerate(output) if i}
            self._passed.setdefault(start, {}).update(further)
        return self.to_rows(output[0])

    def to_rows(self, state: Tensor) -> Tensor:
        """Return hidden states with the batch as the first dimension."""
        return state.movedim(self._batch_dim, 0)

    def from_rows(self, state: Tensor) -> Tensor:
        """Return hidden states in the order of dimensions of the blocks."""
        return state.movedim(0, self._batch_dim)

    def returned(self, state: Tensor) -> Any:
        """Return what a block returns for the output ``state``."""
        return _output(self._form, -1, state)

    def _run(self, ids: Tensor) -> tuple[Tensor, Calls]:
        for form in (self._form, *FORMS):
            try:
                found = run_stubs(self._decoder, self._layers, ids, form)
            except (DivertedError, TypeError, ValueError, AttributeError, IndexError):
                continue
            self._form = form
            return found
        raise UnsupportedModelError(
            f"{self._name} processes the hidden states between its blocks, or runs a block twice.",
            "Use a model whose blocks run one after the other.",
        )


def _batch_dim(shape: Sequence[int], count: int, length: int) -> int:
    """Return the dimension of the ``count`` sequences, beside that of their ``length`` tokens."""
    for i, pair in enumerate(pairwise(shape)):
        if pair == (count, length):
            return i
        if pair == (length, count):
            return i + 1
    return 0


def run_stubs(
    decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, form: int
) -> tuple[Tensor, Calls]:
    """Return the first block's input, and the other arguments of each block that is run.

    Raises:
        DivertedError: a block received another hidden state.
    """
    calls: Calls = {}
    states: list[Tensor] = []

    def stub(index: int, *args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs.pop("hidden_states", None)
        known = states[0] if states else state
        if not isinstance(state, Tensor) or state is not known or index <= max(calls, default=-1):
            raise DivertedError
        states.append(state)
        calls[index] = (args[1:], kwargs)
        return _output(form, index, state)

    with stubbed(layers, stub):
        decoder(input_ids=ids, use_cache=False)
    if not calls:
        raise DivertedError
    return states[0], calls


@contextmanager
def stubbed(layers: nn.ModuleList, stub: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward method of every block with ``stub(index, …)`` for the body."""
    for index, layer in enumerate(layers):
        layer.forward = partial(stub, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _output(form: int, index: int, state: Tensor) -> Any:
    """Return what a block returns, with stand-ins for all but the hidden states."""
    return (state, *(Passed(index, i) for i in range(1, form))) if form else state


def _is_carrier(value: object) -> bool:
    """Return whether blocks write to an argument: a mapping that is empty before they run."""
    return isinstance(value, dict) and not value


def _apart(own: Any, common: Any, seen: dict[int, Any]) -> Any:
    """Return arguments in which tensors equal to the common ones are replaced by those, and others
    moved to the CPU. What blocks write to stays the same object."""
    if id(own) in seen:
        return seen[id(own)]
    made: Any = own
    if isinstance(own, Tensor):
        made = common if _equal(own, common) else own.cpu()
    elif type(own) is dict and own:
        others = common if isinstance(common, dict) else {}
        made = {key: _apart(each, others.get(key), seen) for key, each in own.items()}
    elif type(own) in (list, tuple):
        others = common if type(common) is type(own) and len(common) == len(own) else own
        made = type(own)(_apart(*pair, seen) for pair in zip(own, others, strict=True))
    seen[id(own)] = made
    return made


def _moved(value: Any, device: torch.device, passed: Mapping[Passed, Any]) -> Any:
    """Return arguments with all tensors on a device, and outputs of blocks for their stand-ins."""
    if isinstance(value, Passed):
        return passed.get(value)
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is dict and value:
        return {key: _moved(each, device, passed) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(each, device, passed) for each in value)
    return value


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(one, other))


def same_arguments(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    """Return whether the arguments of two calls are equal; shared masks are compared once."""
    if one is other or (id(one), id(other)) in seen:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        same = _equal(one, other)
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
