"""Watch the linears of a block while it runs, and sum the second moments of what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hisvd_cli.moments import MomentSum

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
        linears: full name → module.
        device: where sums are kept.
        sums: key of a moment → its running sum; the key ends in ``.input`` or ``.output``.
        owners: full name of a linear → key of its moment; a linear that saw nothing has none.
    """

    linears: Mapping[str, nn.Linear]
    device: torch.device
    sums: dict[str, MomentSum] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def grouping(self) -> Iterator[None]:
        """Group the linears, and choose sides, by what the body's run of the block shows."""
        # The inputs are kept until the end: a freed tensor's id could become another one's.
        seen: dict[str, Tensor] = {}

        def noter(name: str) -> Watch:
            def note(_module: nn.Linear, args: tuple[Tensor, ...], _output: Tensor) -> None:
                seen.setdefault(name, args[0])

            return note

        with self._watching(noter):
            yield
        groups: dict[int, list[str]] = {}
        for name, tensor in seen.items():
            groups.setdefault(id(tensor), []).append(name)
        for names in groups.values():
            self._choose_side(names)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Add up the moments of all that the linears see while the body runs the block."""
        with self._watching(self._adder):
            yield

    @contextmanager
    def _watching(self, hook: Callable[[str], Watch]) -> Iterator[None]:
        handles = [m.register_forward_hook(hook(name)) for name, m in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _choose_side(self, names: list[str]) -> None:
        width = self.linears[names[0]].in_features
        if sum(self.linears[name].out_features ** 2 for name in names) < width**2:
            for name in names:
                key = self.owners[name] = f"{name}.output"
                self.sums[key] = MomentSum(self.linears[name].out_features, self.device)
        else:
            key = f"{names[0]}.input"
            self.sums[key] = MomentSum(width, self.device)
            self.owners.update(dict.fromkeys(names, key))

    def _adder(self, name: str) -> Watch:
        key = self.owners.get(name, "")

        def add(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if key == f"{name}.input":  # the group's first member counts the shared input once
                self.sums[key].add(args[0])
            elif key.endswith(".output"):
                bias = module.bias
                # Widened first, so that taking the bias off rounds nothing away.
                self.sums[key].add(output if bias is None else output.float() - bias.float())

        return add
