"""Watch the linears of a block while it runs, and sum the second moments of what they see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hisvd_cli.moments import MomentSum


@dataclass
class Collector:
    """Sums the second moments of a block's linears.

    Linears that are given the very same tensor share one moment. Of each such group the smaller
    side is accumulated: the input's G ``[n, n]`` once, or every member's output moment
    M ``[m, m]``; both lead to the same spectra (M = W G Wᵀ).

    Attributes:
        device: where sums are kept.
        sums: key of a moment → its running sum; the key ends in ``.input`` or ``.output``.
        owners: full name of a linear → key of its moment.
    """

    device: torch.device
    sums: dict[str, MomentSum] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    _first: list[tuple[str, nn.Linear, Tensor, Tensor]] = field(default_factory=list)

    @contextmanager
    def attached(self, block: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch ``linears`` (full name → module) of ``block`` while the body runs it."""
        handles = [block.register_forward_hook(lambda *_: self._settle())]
        for name, module in linears.items():
            handles.append(module.register_forward_hook(self._hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def watch(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in self.owners:
                self._add(name, module, args[0], output)
            else:
                self._first.append((name, module, args[0], output))

        return watch

    def _settle(self) -> None:
        """After the first batch: group the linears by input, choose sides, count that batch."""
        if not self._first:
            return
        groups: dict[int, list[tuple[str, nn.Linear, Tensor, Tensor]]] = {}
        for seen in self._first:
            groups.setdefault(id(seen[2]), []).append(seen)
        for group in groups.values():
            self._choose_side(group)
        for seen in self._first:
            self._add(*seen)
        self._first.clear()

    def _choose_side(self, group: list[tuple[str, nn.Linear, Tensor, Tensor]]) -> None:
        width = group[0][1].in_features
        if sum(module.out_features**2 for _, module, _, _ in group) < width**2:
            for name, module, _, _ in group:
                key = self.owners[name] = f"{name}.output"
                self.sums[key] = MomentSum(module.out_features, self.device)
        else:
            key = f"{group[0][0]}.input"
            self.sums[key] = MomentSum(width, self.device)
            self.owners.update({name: key for name, _, _, _ in group})

    def _add(self, name: str, module: nn.Linear, inputs: Tensor, output: Tensor) -> None:
        key = self.owners[name]
        if key == f"{name}.input":  # the group's first member counts the shared input once
            self.sums[key].add(inputs)
        elif key.endswith(".output"):
            self.sums[key].add(output if module.bias is None else output - module.bias)
