"""How fast models run: tokens per second and latencies, of two models in turns, and their memory.

Prefill is what ``generate`` does with a prompt: one pass that fills the cache and makes logits of
the last token. Decode is what follows: a pass for each token, the likeliest one, and no end of
text ends it, so that as many tokens are made as are counted. Two models take turns (A B A B), so
that whatever slows the machine slows both alike.

Legend: B sequences of P tokens are prompts; N tokens are made after each.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hisvd_cli.utils.errors import HisvdError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Clock = Callable[[], float]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class TimedWork:
    """What a model is timed on: ``batch`` prompts of ``prompt`` tokens, and ``new`` tokens more of
    each, ``turns`` times after one that does not count."""

    batch: int
    prompt: int
    new: int
    turns: int


@dataclass(frozen=True)
class Turn:
    """One prompt and what follows.

    Attributes:
        prefill: seconds until the first token was there.
        steps: seconds of each decode step.
        prompt_tokens: that the prefill read.
        new_tokens: that the steps made.
    """

    prefill: float
    steps: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int

    def seconds(self, phase: Phase) -> float:
        """Return how long a phase took."""
        return self.prefill if phase == "prefill" else sum(self.steps)


@dataclass(frozen=True)
class Timing:
    """A model's turns at one batch size, and the memory that one of them takes: weights and the
    most that was held beside them, in bytes."""

    turns: tuple[Turn, ...]
    peak_memory: int

    def rate(self, phase: Phase) -> float:
        """Return tokens per second, from the median turn."""
        return median(_tokens(turn, phase) / turn.seconds(phase) for turn in self.turns)

    def latencies(self, phase: Phase) -> dict[str, float]:
        """Return percentiles in seconds: of a prefill, or of one step of decode."""
        seconds = [t.prefill for t in self.turns]
        if phase == "decode":
            seconds = [step for turn in self.turns for step in turn.steps]
        return percentiles(seconds)

    def document(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        phases: dict[str, Any] = {
            phase: {
                "tokens": sum(_tokens(turn, phase) for turn in self.turns),
                "tokens_per_second": self.rate(phase),
                "latency_seconds": self.latencies(phase),
            }
            for phase in PHASES
        }
        return {**phases, "peak_memory_bytes": self.peak_memory}


@dataclass(frozen=True)
class Versus:
    """A model's speed as a multiple of the baseline's.

    Attributes:
        speedup: median over turns; above 1 is faster.
        verdict: ``faster`` or ``slower`` where every turn says so, else ``unclear``.
    """

    speedup: float
    verdict: Literal["faster", "slower", "unclear"]


def versus(own: Timing, baseline: Timing, phase: Phase) -> Versus:
    """Compare two timings that were taken in turns, turn by turn."""
    pairs = zip(own.turns, baseline.turns, strict=True)
    ratios = [other.seconds(phase) / mine.seconds(phase) for mine, other in pairs]
    if min(ratios) > 1:
        return Versus(median(ratios), "faster")
    return Versus(median(ratios), "slower" if max(ratios) < 1 else "unclear")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99, linear between two values."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return {f"p{p}": float(torch.quantile(values, p / 100)) for p in PERCENTILES}


class Runner:
    """A model that is timed.

    Args:
        model: in memory.
        compiled: time ``torch.compile`` of it.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        self.model = model
        self.timed: Any = torch.compile(model) if compiled else model

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, shared ones once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def peak_memory(self, work: TimedWork) -> int:
        """Return the bytes of the weights and of the most that a turn holds beside them.

        A GPU counts it. Elsewhere all tensors are counted while they are alive, but not what an
        operation takes for itself. Not compiled.
        """
        ids = prompts(self.model, work)
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            take_turn(self.model, ids, work.new)
            beside = torch.cuda.max_memory_allocated(device) - before
        else:
            with AliveBytes() as alive:
                take_turn(self.model, ids, work.new)
            beside = alive.peak
        return self.weight_bytes + beside


def time_in_turns(
    runners: Mapping[str, Runner],
    work: TimedWork,
    step: Callable[[], None],
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time models on the same prompts, one after the other in every turn.

    Args:
        runners: models by name.
        work: what they run.
        step: called after each model's turn, those that do not count too.
        clock: tells seconds.

    Raises:
        HisvdError: ``torch.compile`` failed.
    """
    if any(runner.timed is not runner.model for runner in runners.values()):
        # Each shape of each model is compiled anew, and after a few torch runs them as they are.
        torch.compiler.reset()
    peaks = {name: runner.peak_memory(work) for name, runner in runners.items()}
    ids = prompts(next(iter(runners.values())).model, work)
    turns: dict[str, list[Turn]] = {name: [] for name in runners}
    for _ in range(1 + work.turns):
        for name, runner in runners.items():
            turns[name].append(_turn(runner, ids, work.new, clock))
            step()
    return {name: Timing(tuple(made[1:]), peaks[name]) for name, made in turns.items()}


def prompts(model: PreTrainedModel, work: TimedWork) -> Tensor:
    """Return random tokens ``[B, P]``, the same in every run: speed depends on no text."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    size = (work.batch, work.prompt)
    return torch.randint(vocabulary, size, generator=generator).to(model.device)


def take_turn(
    model: Any, ids: Tensor, new: int, clock: Clock = time.perf_counter, keep: int = 1
) -> Turn:
    """Run a model on prompts, and let it go on.

    Args:
        model: runs on the device of ``ids``.
        ids: prompts ``[B, P]``.
        new: N, tokens after each; 0 for prefill alone.
        clock: tells seconds.
        keep: logits of so many of the prompt's last tokens are made; 0 for all.
    """
    made = []
    with torch.inference_mode():
        _finish(ids.device)
        ticks = [clock()]
        output = model(input_ids=ids, use_cache=True, logits_to_keep=keep)
        token = output.logits[:, -1:].argmax(-1)
        _finish(ids.device)
        ticks.append(clock())
        for _ in range(new):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            _finish(ids.device)
            ticks.append(clock())
            made.append(token)
    prefill, *steps = (later - earlier for earlier, later in pairwise(ticks))
    return Turn(prefill, tuple(steps), ids.numel(), sum(each.numel() for each in made))


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in the body make, while they are alive.

    Attributes:
        peak: the most at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what is new of its results."""
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage not in given:  # a view, or a parameter, is nothing new
                    self._sizes[storage] = tensor.untyped_storage().nbytes()
        self._sizes = {ref: size for ref, size in self._sizes.items() if ref() is not None}
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


def _storage(tensor: Tensor) -> weakref.ref[Any]:
    return weakref.ref(tensor.untyped_storage())


def _turn(runner: Runner, ids: Tensor, new: int, clock: Clock) -> Turn:
    if runner.timed is runner.model:
        return take_turn(runner.model, ids, new, clock)
    from torch._dynamo.exc import TorchDynamoException

    try:
        return take_turn(runner.timed, ids, new, clock)
    except TorchDynamoException as error:
        raise HisvdError(
            f"torch.compile failed: {type(error).__name__}.",
            "Run without --compile, or see the cause with HISVD_DEBUG=1.",
        ) from error


def _tokens(turn: Turn, phase: Phase) -> int:
    return turn.prompt_tokens if phase == "prefill" else turn.new_tokens


def _finish(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
