"""Watch the linears of a block while it runs, and sum the second moments of what they see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from hisvd_cli.linalg.moments import AddUp, ChannelSum, MomentSum, add_up_count

Watch = Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]


@dataclass
class Collector:
    """Sums the second moments of a block's linears, in two runs of the block.

    The first, over any one sequence, shows which linears are given the very same tensor; those
    share one moment. Of each such group the smaller side is then accumulated: the input's G
    ``[n, n]`` once, or every member's output moment M ``[m, m]``, where their entries together are
    fewer; both lead to the same spectra (M = W G Wᵀ). Grouping first means that no activation is
    kept, however many tokens a batch has.

    Attributes:
        linears: full name → module; a low-rank or quantized layer serves as well.
        device: where sums are kept.
        sums: key of a statistic → its running sum; the key of a moment ends in ``.input`` or
            ``.output``, that of the means of an input's channels in ``.channels``.
        owners: full name of a linear → keys of its moment and of its channels; a linear that saw
            nothing has none.
        of_inputs: accumulate the inputs' G of every group.
    """

    linears: Mapping[str, nn.Linear]
    device: torch.device
    sums: dict[str, MomentSum | ChannelSum] = field(default_factory=dict)
    owners: dict[str, tuple[str, str]] = field(default_factory=dict)
    of_inputs: bool = False

    @contextmanager
    def grouping(self) -> Iterator[list[list[str]]]:
        """Yield a list that, after the body's run of the block, holds the groups of linears."""
        # The inputs are kept until the end: a freed tensor's id could become another one's.
        seen: dict[str, Tensor] = {}

        def noter(name: str) -> Watch:
            def note(_module: nn.Linear, args: tuple[Tensor, ...], _output: Tensor) -> None:
                seen.setdefault(name, args[0])

            return note

        found: list[list[str]] = []
        with self._watching(noter):
            yield found
        groups: dict[int, list[str]] = {}
        for name, tensor in seen.items():
            groups.setdefault(id(tensor), []).append(name)
        found += groups.values()

    def choose_sides(self, groups: Iterable[list[str]]) -> None:
        """Choose which moments are summed for each group of linears with a common input."""
        for names in groups:
            self._choose_side(names)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Add up the moments of all that the linears see while the body runs the block."""
        with self._watching(self._adder):
            yield

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        for total in self.sums.values():
            total.pool(add_up)

    @contextmanager
    def _watching(self, hook: Callable[[str], Watch]) -> Iterator[None]:
        handles = [m.register_forward_hook(hook(name)) for name, m in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _choose_side(self, names: list[str]) -> None:
        first, width = names[0], self.linears[names[0]].in_features
        channels = f"{first}.channels"
        self.sums[channels] = ChannelSum(width, self.device)
        heights = {name: self.linears[name].out_features for name in names}
        fewer = sum(height**2 for height in heights.values()) < width**2
        if fewer and not self.of_inputs:
            for name, height in heights.items():
                self.sums[f"{name}.output"] = MomentSum(height, self.device)
                self.owners[name] = (f"{name}.output", channels)
        else:
            self.sums[f"{first}.input"] = MomentSum(width, self.device)
            self.owners.update(dict.fromkeys(names, (f"{first}.input", channels)))

    def _adder(self, name: str) -> Watch:
        moment, channels = self.owners.get(name, ("", ""))

        def add(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The group's first member counts what all of them share.
            for key in {moment, channels} & {f"{name}.input", f"{name}.channels"}:
                self.sums[key].add(args[0])
            if moment.endswith(".output"):
                bias = module.bias
                # Widened first, so that taking the bias off rounds nothing away.
                self.sums[moment].add(output if bias is None else output.float() - bias.float())

        return add


class TurnSum:
    """Mean angle, as a share of π, between what enters a block and what leaves it, per token."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Add up the angles of all tokens that pass the block while the body runs it."""
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
        """Add the sums of other processes, on the first."""
        total = torch.tensor(self._sum, dtype=torch.float64)
        add_up(total)
        self._sum = float(total)
        self._tokens = add_up_count(self._tokens, add_up)

    def mean(self) -> float:
        """Return the mean over all tokens so far, from 0 to 1."""
        return self._sum / self._tokens
