"""A training loop with a fixed budget that keeps the best held-out state and can resume.

``accelerate`` runs the optimizer and writes its state; parameters, data and loss are passed in.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hisvd_cli.utils.errors import NumericalError, SourceError
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.checksums import intact, seal, sealed
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors, serializing, write_tensors
from hisvd_cli.utils.progress import Reporter

BEST = "best.safetensors"
_STATE = "state"
_TICKS = 1000  # steps of the progress bar
_BETAS = (0.9, 0.95)
_CLIP = 1.0  # maximum norm of the whole gradient, as is common for language models


@dataclass(frozen=True)
class Schedule:
    """The schedule of a training.

    Attributes:
        seconds: time limit, including evaluations; None for no limit.
        tokens: token limit; None for no limit. At least one of the two is given.
        learning_rate: peak learning rate.
        batch: windows per step.
        together: windows per forward pass, for gradient accumulation.
        seed: random seed of the order of windows.
        warmup: share of the budget for warm-up.
        evaluations: number of held-out evaluations after the first.
        state_seconds: interval between writes of the state.
    """

    seconds: float | None
    tokens: int | None
    learning_rate: float
    batch: int
    together: int
    seed: int
    warmup: float = 0.05
    evaluations: int = 6
    state_seconds: float = 120.0

    def rate(self, progress: float) -> float:
        """Return the learning rate at a share of the budget: linear warm-up, then cosine decay."""
        if progress < self.warmup:
            return self.learning_rate * max(progress, 0.01 * self.warmup) / self.warmup
        done = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Trainee:
    """Parameters, data and loss of a training.

    Attributes:
        parameters: parameters by name.
        windows: number of training windows.
        loss: maps indices of windows to the summed loss and the number of tokens in it.
        held_out: evaluates the current state; returns measures in nats per token, of which the
            first selects the best state.
    """

    parameters: Mapping[str, nn.Parameter]
    windows: int
    loss: Callable[[Tensor], tuple[Tensor, int]]
    held_out: Callable[[], dict[str, float]]


@dataclass
class Progress:
    """The progress of a training.

    Attributes:
        steps: optimizer steps.
        tokens: number of tokens trained on.
        seconds: duration, including earlier interrupted runs.
        measured: number of held-out evaluations.
        before: held-out measures before training.
        best: held-out measures of the best state.
        best_step: step of the best state.
        stopped: why the training stopped early; empty if it did not.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    measured: int = 0
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    stopped: str = ""


class Training:
    """One training with a work folder, from which it resumes after an interruption."""

    def __init__(
        self,
        trainee: Trainee,
        schedule: Schedule,
        home: Path,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        from accelerate import Accelerator

        self.trainee, self.schedule, self.home = trainee, schedule, home
        self.reporter = reporter
        self.progress = Progress()
        self._accelerator = Accelerator(cpu=device.type == "cpu", device_placement=False)
        self._optimizer = self._accelerator.prepare(
            torch.optim.AdamW(
                list(trainee.parameters.values()),
                lr=schedule.learning_rate,
                betas=_BETAS,
                weight_decay=0.0,
                fused=True,
            )
        )
        self._accelerator.register_for_checkpointing(self)
        self._measuring = 0.0  # seconds of a held-out measurement
        self._started = 0.0

    def run(self) -> tuple[dict[str, Tensor], Progress]:
        """Train, and return the best parameters and the progress.

        Raises:
            NumericalError: the held-out loss is not finite before training.
            OutputError: the work folder cannot be written.
        """
        self._resume()
        self._started = time.monotonic() - self.progress.seconds
        if not self.progress.measured:
            self._measure()
        saved = time.monotonic()
        with self.reporter.stage("Training", _TICKS) as tick:
            shown = 0
            while not self.progress.stopped and (share := self._share()) < 1:
                for _ in range(shown, int(share * _TICKS)):
                    tick()
                shown = max(shown, int(share * _TICKS))
                self._step(share)
                if share >= self.progress.measured / self.schedule.evaluations:
                    self._measure()
                if time.monotonic() - saved >= self.schedule.state_seconds:
                    self._save()
                    saved = time.monotonic()
            for _ in range(shown, _TICKS):
                tick()
        if not self.progress.stopped:
            self._measure()
        best, _ = read_tensors(self.home / BEST, AGAIN)
        return best, self.progress

    def state_dict(self) -> dict[str, Any]:
        """Return the state that accelerate writes."""
        parameters = {name: p.detach() for name, p in self.trainee.parameters.items()}
        return {"parameters": parameters, "progress": asdict(self.progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that accelerate has written."""
        with torch.no_grad():
            for name, parameter in self.trainee.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.progress = Progress(**state["progress"])

    def _share(self) -> float:
        """Return the used share of the budget, the larger one of time and tokens."""
        self.progress.seconds = time.monotonic() - self._started
        shares = [0.0]
        if self.schedule.seconds is not None:
            # The budget includes the last evaluation.
            shares.append((self.progress.seconds + self._measuring) / self.schedule.seconds)
        if self.schedule.tokens is not None:
            shares.append(self.progress.tokens / self.schedule.tokens)
        return max(shares)

    def _step(self, share: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.rate(share)
        rows = self._rows(self.progress.steps)
        losses = []
        for part in rows.split(self.schedule.together):
            loss, tokens = self.trainee.loss(part)
            self.progress.tokens += tokens
            losses.append((loss.detach(), tokens))
            self._accelerator.backward(loss)
        count = max(sum(tokens for _, tokens in losses), 1)
        # Parts may have different numbers of counted tokens, so the mean is taken over all of them.
        for parameter in self.trainee.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        norm = self._accelerator.clip_grad_norm_(list(self.trainee.parameters.values()), _CLIP)
        total = sum(float(loss) for loss, _ in losses)
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            self._stop("the loss is not finite")
            return
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.progress.steps += 1

    def _rows(self, step: int) -> Tensor:
        """Return the windows of a step; each epoch has its own random order."""
        total, batch = self.trainee.windows, self.schedule.batch
        places = range(step * batch, (step + 1) * batch)
        epochs = {place // total for place in places}
        orders = {
            epoch: torch.randperm(
                total, generator=torch.Generator().manual_seed(self.schedule.seed + epoch)
            )
            for epoch in epochs
        }
        return torch.stack([orders[place // total][place % total] for place in places])

    def _measure(self) -> None:
        """Evaluate the current state on held-out text, and keep it if it is the best so far."""
        started = time.monotonic()
        found = self.trainee.held_out()
        self._measuring = time.monotonic() - started
        progress = self.progress
        value, best = _first(found), _first(progress.best)
        progress.measured += 1
        if not math.isfinite(value):
            if not progress.before:
                raise NumericalError(
                    "The loss of the checkpoint on held-out text is not finite.",
                    "Check it with 'hisvd inspect', or set `model.dtype` to float32.",
                )
            self._stop("the held-out loss is not finite")
            return
        progress.before = progress.before or found
        self.reporter.note(f"Step {progress.steps}: held-out {_text(found)}.")
        if value < best:
            progress.best, progress.best_step = found, progress.steps
            tensors = {name: p.detach() for name, p in self.trainee.parameters.items()}
            about = {"measures": json.dumps(found), "step": str(progress.steps)}
            write_tensors(self.home / BEST, tensors, about)

    def _stop(self, why: str) -> None:
        progress = self.progress
        progress.stopped = f"{why} at step {progress.steps}"
        self.reporter.warn(
            f"Training stopped early: {progress.stopped}. The best state, of step "
            f"{progress.best_step}, is written. A lower `recover.learning_rate` may help."
        )

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        with building(self.home / _STATE, "") as folder, serializing(folder):
            self._accelerator.save_state(str(folder))
            seal(folder)

    def _resume(self) -> None:
        state, best = self.home / _STATE, self.home / BEST
        if (state.is_dir() and not sealed(state)) or (best.is_file() and not intact(best)):
            self.reporter.warn("The state of the interrupted training is damaged: starting again.")
            shutil.rmtree(state, ignore_errors=True)
            best.unlink(missing_ok=True)
        if (self.home / _STATE).is_dir():
            self._accelerator.load_state(str(self.home / _STATE))
            self.reporter.note(f"Resuming after step {self.progress.steps}.")
        if (self.home / BEST).is_file():
            # The best state is written immediately, so it may be newer than the stored state.
            _, about = read_tensors(self.home / BEST, AGAIN, _none)
            try:
                found = parse_json(about["measures"], strict=False)
                at = int(about["step"])
            except (KeyError, ValueError) as error:
                raise SourceError(f"{self.home / BEST} is damaged.", AGAIN) from error
            if _first(found) < _first(self.progress.best):
                self.progress.best, self.progress.best_step = found, at


def _none(_name: str) -> bool:
    return False


def _first(measures: Mapping[str, float]) -> float:
    return next(iter(measures.values()), math.inf)


def _text(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
