"""Gradients of the weights of a block, a mean for each batch of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hisvd_cli.gradient_collector import Watch, as_sequences, watching
from hisvd_cli.moments import AddUp


class BatchGradients:
    """Sums, per linear and batch, the weight's gradient Σ_t g xᵀ ``[m, n]`` in float32.

    Args:
        linears: full name → module.
        device: where sums are kept.
        samples: number of all sequences.
        seqlen: tokens per sequence.
        batches: into how many batches, each of sequences in a row, they are parted.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        device: torch.device,
        *,
        samples: int,
        seqlen: int,
        batches: int,
    ) -> None:
        self._linears = linears
        self._seqlen = seqlen
        self._batch_of = [i * batches // samples for i in range(samples)]
        self._start = 0
        self._sums = {
            name: [torch.zeros(m.weight.shape, device=device) for _ in range(batches)]
            for name, m in linears.items()
        }

    @contextmanager
    def summing(self, start: int) -> Iterator[None]:
        """Add up all gradients that pass back through the linears while the body runs one chunk.

        Args:
            start: number of its first sequence.
        """
        self._start = start
        with watching(self._linears, self._watcher):
            yield

    def _watcher(self, name: str) -> Watch:
        def watch(_module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(self._adder(name, args[0].detach()))

        return watch

    def _adder(self, name: str, x: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            pair = (as_sequences(t.float(), self._seqlen) for t in (x, gradient))
            for i, (inputs, gradients) in enumerate(zip(*pair, strict=True)):
                self._sums[name][self._batch_of[self._start + i]] += gradients.T @ inputs

        return add

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        for sums in self._sums.values():
            for total in sums:
                add_up(total)

    def means(self, name: str) -> list[Tensor]:
        """Return the gradient ``[m, n]`` of the mean loss of a predicted token, for each batch, on
        the CPU."""
        return [
            (total / (self._batch_of.count(batch) * (self._seqlen - 1))).cpu()
            for batch, total in enumerate(self._sums[name])
        ]
