"""Watch the linears of a block while a gradient passes back through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hisvd_cli.linalg.moments import AddUp, MomentSum, Side, add_up_count

Watch = Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]


class GradientCollector:
    """Sums, per linear, the second moment of the gradient, and what its weight's gradient shows.

    With g the gradient at the output, the moment is H = E[g gᵀ] ``[m, m]``, or where the input is
    narrower that of what g adds to the gradient at the input, E[(Wᵀg)(Wᵀg)ᵀ] = Wᵀ H W ``[n, n]``:
    for a LLaMA's gate and up a seventh of the size, and of the work of every token.

    Args:
        linears: full name → module.
        device: where sums are kept.
        keys: full name → key of its moment, as ``Calibration.moment_keys`` has it; the moments of
            every other sequence are taken once more.
        seqlen: tokens per sequence.
        weights: whether the weights' gradients are taken too.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        device: torch.device,
        *,
        keys: Mapping[str, str],
        seqlen: int,
        weights: bool,
    ) -> None:
        self._linears = linears
        self._keys = keys
        self._seqlen = seqlen
        self._start = 0
        self._halves: dict[str, MomentSum] = {}
        for name, linear in linears.items():
            tall = keys[name].endswith(".output")
            width = linear.out_features if tall else linear.in_features
            self._halves.setdefault(keys[name], MomentSum(width, device))
            self._halves[name] = MomentSum(min(linear.weight.shape), device)
        self._squares = {name: MeanSquare() for name in linears}
        self._sums = {n: MomentSum(min(m.weight.shape), device) for n, m in linears.items()}
        self._weights = {n: WeightSum(m, device) for n, m in linears.items()} if weights else {}

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
        def watch(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            self._add_input(name, module, x, output.detach())

            def add(gradient: Tensor) -> None:
                self._squares[name].add(gradient)
                narrow = gradient @ module.weight if side_of(module) == "input" else gradient
                self._sums[name].add(narrow)
                self._add_half(name, narrow)
                if name in self._weights:
                    pair = (as_sequences(t, self._seqlen) for t in (x, gradient))
                    self._weights[name].add(*pair)

            output.register_hook(add)

        return watch

    def _add_input(self, name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        key = self._keys[name]
        if key == f"{name}.input":
            self._add_half(key, x)
        elif key == f"{name}.output":
            bias = module.bias
            self._add_half(key, output if bias is None else output.float() - bias.float())

    def _add_half(self, key: str, rows: Tensor) -> None:
        """Add sequences of even number alone."""
        even = as_sequences(rows, self._seqlen)[self._start % 2 :: 2]
        if len(even):
            self._halves[key].add(even)

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        for sums in (self._sums, self._halves, self._squares, self._weights):
            for total in sums.values():
                total.pool(add_up)

    def means(self) -> dict[str, Tensor]:
        """Return, for each linear, ``name.output`` → H ``[m, m]`` or ``name.input`` → Wᵀ H W
        ``[n, n]``, and ``name.square`` → E of the mean of g² ``[]``; of sequences of even number
        alone, ``name.half`` → the same moment, and ``key.half`` → that of the linear itself, by its
        key. All in float32 on the CPU."""
        found = {}
        for name, linear in self._linears.items():
            found[f"{name}.{side_of(linear)}"] = self._sums[name].mean()
            found[f"{name}.square"] = self._squares[name].mean()
        halves = {f"{key}.half": total.mean() for key, total in self._halves.items()}
        return {**found, **halves}

    def weight_means(self) -> dict[str, Tensor]:
        """Return name with the ending of each part of ``WeightGradients`` → its mean."""
        return {
            f"{name}.{part}": mean
            for name, total in self._weights.items()
            for part, mean in total.means().items()
        }


@contextmanager
def watching(linears: Mapping[str, nn.Linear], watcher: Callable[[str], Watch]) -> Iterator[None]:
    """Hook what ``watcher`` returns for its name to each linear while the body runs."""
    handles = [module.register_forward_hook(watcher(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_sequences(rows: Tensor, seqlen: int) -> Tensor:
    """Return ``[S, L, width]``; some models hand their linears all tokens in one row."""
    return rows.reshape(-1, seqlen, rows.shape[-1])


def side_of(linear: nn.Linear) -> Side:
    """Return on which side of a linear the gradient's moment is the smaller one."""
    m, n = linear.weight.shape
    return "output" if m <= n else "input"


class MeanSquare:
    """Running mean of all squared entries."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Add entries of any shape."""
        self._sum += float(values.float().square().sum())
        self._count += values.numel()

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        total = torch.tensor(self._sum, dtype=torch.float64)
        add_up(total)
        self._sum = float(total)
        self._count = add_up_count(self._count, add_up)

    def mean(self) -> Tensor:
        """Return the mean ``[]`` in float32."""
        return torch.tensor(self._sum / self._count, dtype=torch.float32)


class WeightSum:
    """Running sums over sequences of D = Σ_t g xᵀ ``[m, n]``, D Dᵀ and Dᵀ D, in float32.

    Args:
        linear: whose weight it is.
        device: where sums are kept.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        m, n = linear.out_features, linear.in_features
        self._mean = torch.zeros(m, n, device=device)
        self._output = torch.zeros(m, m, device=device)
        self._input = torch.zeros(n, n, device=device)
        self._sequences = 0

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add inputs ``[S, L, n]`` and the gradients ``[S, L, m]`` at their outputs."""
        for inputs, gradients in zip(x.float(), gradient.float(), strict=True):
            whole = gradients.T @ inputs
            self._mean += whole
            self._output += whole @ whole.T
            self._input += whole.T @ whole
            self._sequences += 1

    def pool(self, add_up: AddUp) -> None:
        """Add the sums of other processes, on the first."""
        for total in (self._mean, self._output, self._input):
            add_up(total)
        self._sequences = add_up_count(self._sequences, add_up)

    def means(self) -> dict[str, Tensor]:
        """Return the means as ``WeightGradients`` names them, in float32 on the CPU."""
        sums = {"mean": self._mean, "output": self._output, "input": self._input}
        return {part: (total / self._sequences).cpu() for part, total in sums.items()}


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
