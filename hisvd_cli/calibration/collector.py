"""Collects second moments of the inputs and outputs of the linear layers of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from hisvd_cli.calibration.routing import Hits, weighted
from hisvd_cli.linalg.moments import AddUp, ChannelSum, MomentSum, add_up_count

Hook = Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]
"""A forward hook of a linear layer: module, arguments, output."""


@contextmanager
def hooked(linears: Mapping[str, nn.Linear], hook: Callable[[str], Hook]) -> Iterator[None]:
    """Register the forward hook ``hook(name)`` on each linear layer while the body runs."""
    handles = [module.register_forward_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Collector:
    """Sums the second moments of the linear layers of a block in two runs of the block.

    The first run, over one sequence, finds the layers that receive the same tensor; they share a
    moment. For each such group either the moment G ``[n, n]`` of the input is accumulated, or the
    moments M ``[m, m]`` of all outputs if they have fewer entries together; both give the same
    spectra (M = W G Wᵀ). Since groups are known in advance, no activations have to be kept.

    Attributes:
        linears: modules by full name; low-rank and quantized layers are supported.
        device: where sums are kept.
        sums: running sums by key; the key of a moment ends in ``.input`` or ``.output``, that of
            the channel means of an input in ``.channels``.
        owners: keys of the moment and of the channels by full name of the layer; a layer that was
            not run has none.
        of_inputs: accumulate the moments of inputs for every group.
        stacks: stack → its members, for experts; each has a moment of its own, of its input.
        hits: tokens of each expert.
    """

    linears: Mapping[str, nn.Linear]
    device: torch.device
    sums: dict[str, MomentSum | ChannelSum] = field(default_factory=dict)
    owners: dict[str, tuple[str, str]] = field(default_factory=dict)
    of_inputs: bool = False
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hits: dict[str, Hits] = field(default_factory=dict)

    @contextmanager
    def grouping(self) -> Iterator[list[list[str]]]:
        """Yield a list that holds the groups of layers after the block has run in the body."""
        # Inputs are kept until the end: the id of a freed tensor may be reused.
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Hook:
            def note(_module: nn.Linear, args: tuple[Tensor, ...], _output: Tensor) -> None:
                seen.setdefault(name, args[0])

            return note

        found: list[list[str]] = []
        with hooked(self.linears, hook):
            yield found
        groups: dict[int, list[str]] = {}
        for name, tensor in seen.items():
            groups.setdefault(id(tensor), []).append(name)
        found += groups.values()

    def choose_sides(self, groups: Iterable[list[str]]) -> None:
        """Choose which moments are summed for each group of layers with a common input."""
        experts = [name for members in self.stacks.values() for name in members]
        self.hits = {name: Hits() for name in experts}
        for names in groups:
            if plain := [name for name in names if name not in self.hits]:
                self._choose_side(plain)
        for name in experts:
            self._sum_inputs([name])

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Sum moments while the body runs the block."""
        with hooked(self.linears, self._adder):
            yield

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of the other processes on the first process."""
        for total in (*self.sums.values(), *self.hits.values()):
            total.pool(add_up)

    def count_experts(self, tokens: int) -> None:
        """Make the moments of experts means over ``tokens`` tokens of the text."""
        for name in self.hits:
            for key in self.owners[name]:
                self.sums[key].count_as(tokens)

    def _choose_side(self, names: list[str]) -> None:
        first, width = names[0], self.linears[names[0]].in_features
        heights = {name: self.linears[name].out_features for name in names}
        if self.of_inputs or sum(height**2 for height in heights.values()) >= width**2:
            self._sum_inputs(names)
            return
        channels = f"{first}.channels"
        self.sums[channels] = ChannelSum(width, self.device)
        for name, height in heights.items():
            self.sums[f"{name}.output"] = MomentSum(height, self.device)
            self.owners[name] = (f"{name}.output", channels)

    def _sum_inputs(self, names: list[str]) -> None:
        """Sum the moment of the input that layers share."""
        first, width = names[0], self.linears[names[0]].in_features
        self.sums[f"{first}.channels"] = ChannelSum(width, self.device)
        self.sums[f"{first}.input"] = MomentSum(width, self.device)
        self.owners.update(dict.fromkeys(names, (f"{first}.input", f"{first}.channels")))

    def _adder(self, name: str) -> Hook:
        moment, channels = self.owners.get(name, ("", ""))

        def add(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Shared statistics are counted by the first layer of the group.
            for key in {moment, channels} & {f"{name}.input", f"{name}.channels"}:
                self.sums[key].add(weighted(module, args[0]))
            if name in self.hits:
                self.hits[name].add(module, args[0])
            if moment.endswith(".output"):
                bias = module.bias
                # In float32, so that subtracting the bias does not round.
                self.sums[moment].add(output if bias is None else output.float() - bias.float())

        return add


class TurnSum:
    """Mean angle per token between input and output of a block, as a share of π."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Sum the angles of all tokens while the body runs the block."""
        handle = block.register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, _block: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        state = cast(Tensor, output[0] if isinstance(output, tuple) else output)
        cosine = torch.cosine_similarity(args[0].float(), state.float(), dim=-1)
        self._sum += float(cosine.clamp(-1, 1).acos().sum()) / math.pi
        self._tokens += cosine.numel()

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of the other processes on the first process."""
        total = torch.tensor(self._sum, dtype=torch.float64)
        add_up(total)
        self._sum = float(total)
        self._tokens = add_up_count(self._tokens, add_up)

    def mean(self) -> float:
        """Return the mean over all tokens, from 0 to 1; 0 for a block that is not run on text."""
        return self._sum / max(self._tokens, 1)
