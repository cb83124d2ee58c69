"""Collects gradient statistics of the linear layers of a block during its backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hisvd_cli.calibration.collector import Hook, hooked
from hisvd_cli.calibration.gradient_sums import MeanSquare, WeightSum
from hisvd_cli.calibration.routing import Hits, pool_stacks, routed, weighted
from hisvd_cli.linalg.moments import AddUp, MomentSum, Side, add_up_count
from hisvd_cli.modeling.structure.expert_linears import Routed


class _ChunkCollector(ABC):
    """Collects from linear layers while chunks of sequences run forward and backward."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._start = 0
        self._sequences = 0
        self._even = 0  # of these, those with an even index

    @contextmanager
    def summing(self, start: int, count: int) -> Iterator[None]:
        """Sum the gradients of all layers while the body runs one chunk forward and backward.

        Args:
            start: index of the first sequence of the chunk.
            count: number of sequences in it.
        """
        self._start = start
        self._sequences += count
        self._even += len(range(start + start % 2, start + count, 2))
        with hooked(self._linears, self._hook):
            yield

    @abstractmethod
    def _hook(self, name: str) -> Hook:
        """Return the hook that collects from a layer."""


class GradientCollector(_ChunkCollector):
    """Sums the second moment of the gradient of each linear layer, and optionally weight gradients.

    With g the gradient at the output, the moment is H = E[g gᵀ] ``[m, m]``, or, if the input is
    narrower, E[(Wᵀg)(Wᵀg)ᵀ] = Wᵀ H W ``[n, n]``, the moment of the contribution to the gradient at
    the input. For gate and up projections of LLaMA this is a seventh of the size and of the work.

    Args:
        linears: modules by full name.
        device: where sums are kept.
        keys: key of the moment by full name, see ``Calibration.moment_keys``; the moments of every
            other sequence are also summed separately.
        seqlen: tokens per sequence.
        weights: whether weight gradients are collected too.
        stacks: stack → its members, for experts.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        device: torch.device,
        *,
        keys: Mapping[str, str],
        seqlen: int,
        weights: bool,
        stacks: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(linears)
        self._keys = keys
        self._seqlen = seqlen
        self._halves: dict[str, MomentSum] = {}
        self._stacks = stacks or {}
        self._hits = {name: Hits() for each in self._stacks.values() for name in each}
        for name, linear in linears.items():
            tall = keys[name].endswith(".output")
            width = linear.out_features if tall else linear.in_features
            self._halves.setdefault(keys[name], MomentSum(width, device))
            self._halves[name] = MomentSum(min(linear.weight.shape), device)
        self._squares = {name: MeanSquare() for name in linears}
        self._sums = {n: MomentSum(min(m.weight.shape), device) for n, m in linears.items()}
        self._weights = {n: WeightSum(m, device) for n, m in linears.items()} if weights else {}

    def _hook(self, name: str) -> Hook:
        def watch(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, rows = args[0].detach(), routed(module)
            self._add_input(name, module, x, output.detach())
            # Experts that run on all tokens get zeros for those of other experts.
            own = (x != 0).any(-1, keepdim=True) if name in self._hits and rows is None else None

            def add(gradient: Tensor) -> None:
                gradient = gradient if own is None else gradient * own
                self._squares[name].add(gradient)
                narrow = gradient @ module.weight if side_of(module) == "input" else gradient
                self._sums[name].add(narrow)
                self._add_half(name, narrow, rows)
                if name in self._weights:
                    pair = (as_sequences(t, self._seqlen) for t in (x, gradient))
                    self._weights[name].add(*pair)

            if output.requires_grad:
                output.register_hook(add)
            else:  # the loss does not depend on it
                add(torch.zeros_like(output))

        return watch

    def _add_input(self, name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        key = self._keys[name]
        if name in self._hits:
            self._hits[name].add(module, x)
        if key == f"{name}.input":
            self._add_half(key, weighted(module, x), routed(module))
        elif key == f"{name}.output":
            bias = module.bias
            plain = output if bias is None else output.float() - bias.float()
            self._add_half(key, plain, None)

    def _add_half(self, key: str, rows: Tensor, of: Routed | None) -> None:
        """Add the sequences with an even index; the rows of an expert are of the tokens ``of``."""
        if of is not None:
            sequence = self._start + of.tokens.div(self._seqlen, rounding_mode="floor")
            even = rows[sequence % 2 == 0]
        else:
            even = as_sequences(rows, self._seqlen)[self._start % 2 :: 2]
        if len(even):
            self._halves[key].add(even)

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of the other processes on the first process."""
        for sums in (self._sums, self._halves, self._squares, self._weights, self._hits):
            for total in sums.values():
                total.pool(add_up)
        self._sequences = add_up_count(self._sequences, add_up)
        self._even = add_up_count(self._even, add_up)

    def means(self) -> dict[str, Tensor]:
        """Return the means in float32 on the CPU.

        For each layer: ``name.output`` is H ``[m, m]``, or ``name.input`` is Wᵀ H W ``[n, n]``;
        ``name.square`` is E[g²] ``[]``; ``name.half`` is the moment of the gradient, and
        ``key.half`` that of the activations, over the sequences with an even index.
        """
        self._count_experts()
        found = {}
        for name, linear in self._linears.items():
            found[f"{name}.{side_of(linear)}"] = self._sums[name].mean()
            found[f"{name}.square"] = self._squares[name].mean()
        halves = {f"{key}.half": total.mean() for key, total in self._halves.items()}
        means = {**found, **halves}
        hits = {name: each.tokens for name, each in self._hits.items()}
        widths = {name: min(linear.weight.shape) for name, linear in self._linears.items()}
        for end in ("output", "input", "half", "square"):
            pool_stacks(means, self._stacks, hits, end, widths)
        pool_stacks(means, self._stacks, hits, "input.half")
        return means

    def _count_experts(self) -> None:
        """Make the gradients of experts sums over p², and the halves of their inputs means."""
        half = self._even / self._sequences
        for name, hits in self._hits.items():
            squares = hits.squares or 1.0
            self._sums[name].count_as(squares)
            self._squares[name].count_as(squares * self._linears[name].out_features)
            self._halves[name].count_as(half * squares)
            self._halves[f"{name}.input"].count_as(self._even * self._seqlen)

    def weight_means(self) -> dict[str, Tensor]:
        """Return the mean of each part of ``WeightGradients`` by ``name.part``."""
        return {
            f"{name}.{part}": mean
            for name, total in self._weights.items()
            for part, mean in total.means().items()
        }


def as_sequences(rows: Tensor, seqlen: int) -> Tensor:
    """Return ``[S, L, width]``; some models flatten all tokens before their linear layers."""
    return rows.reshape(-1, seqlen, rows.shape[-1])


def side_of(linear: nn.Linear) -> Side:
    """Return the side of a linear layer on which the moment of the gradient is smaller."""
    m, n = linear.weight.shape
    return "output" if m <= n else "input"


class BatchGradients(_ChunkCollector):
    """Sums the weight gradient Σ_t g xᵀ ``[m, n]`` per linear layer and batch, in float32.

    Args:
        linears: modules by full name.
        device: where sums are kept.
        samples: total number of sequences.
        seqlen: tokens per sequence.
        batches: number of batches of consecutive sequences.
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
        super().__init__(linears)
        self._seqlen = seqlen
        self._batch_of = [i * batches // samples for i in range(samples)]
        self._sums = {
            name: [torch.zeros(m.weight.shape, device=device) for _ in range(batches)]
            for name, m in linears.items()
        }

    def _hook(self, name: str) -> Hook:
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
        """Add the sums of the other processes on the first process."""
        for sums in self._sums.values():
            for total in sums:
                add_up(total)

    def means(self, name: str) -> list[Tensor]:
        """Return the gradient ``[m, n]`` of the mean loss per predicted token for each batch, on
        the CPU."""
        return [
            (total / (self._batch_of.count(batch) * (self._seqlen - 1))).cpu()
            for batch, total in enumerate(self._sums[name])
        ]
