"""Measures the speed of models, alternating with the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hisvd_cli.calibration.text.tokens import model_positions
from hisvd_cli.evaluation.efficiency import Runner, TimedWork, time_in_turns
from hisvd_cli.evaluation.speed import BatchSpeed, Speed
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.config.settings import Settings
from hisvd_cli.pipelines.samples import stored_dtype
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.progress import Reporter

DEFAULT_PROMPT = 512


class SpeedRunner:
    """Times models, each alternating with the baseline.

    The baseline stays in memory, with one other model at a time.

    Args:
        resolved: the settings.
        sources: all models, with the baseline; prompts fit into the positions of each.
        baseline: the model to compare with, if any.
        reporter: receives progress.

    Raises:
        UsageError: prompt and new tokens exceed the positions of a model.
    """

    def __init__(
        self,
        resolved: Resolved,
        sources: Sequence[Source],
        baseline: Source | None,
        reporter: Reporter,
    ) -> None:
        self._settings = resolved.settings
        self._work = workload(resolved.settings, sources) if self.wanted else None
        self._baseline = baseline
        self._reporter = reporter
        self._baseline_runner: Runner | None = None

    @property
    def wanted(self) -> bool:
        """Whether the settings request timing."""
        return self._settings.eval.efficiency

    def time(self, source: Source) -> Speed | None:
        """Time a model; None if timing is not requested.

        Raises:
            HisvdError: it cannot be loaded or compiled.
        """
        if self._work is None:
            return None
        own = self._open(source)
        if self._baseline and not self._baseline_runner:
            self._baseline_runner = self._open(self._baseline)
        runners = {
            **({"baseline": self._baseline_runner} if self._baseline_runner else {}),
            "model": own,
        }
        sizes = sorted(set(self._settings.eval.batch_sizes))
        count = len(sizes) * len(runners) * (1 + self._work.turns)
        speeds = []
        with self._reporter.stage(f"Timing {Path(source.name).name}", count) as step:
            for batch in sizes:
                timed = time_in_turns(runners, replace(self._work, batch=batch), step)
                speeds.append(BatchSpeed(batch, timed["model"], timed.get("baseline")))
        return Speed(
            device=str(own.model.device),
            dtype=dtype_name(own.model.dtype),
            threads=torch.get_num_threads(),
            compiled=self._settings.eval.compile,
            work=self._work,
            weight_bytes=own.weight_bytes,
            baseline_weight_bytes=self._baseline_runner.weight_bytes
            if self._baseline_runner
            else None,
            speeds=speeds,
        )

    def _open(self, source: Source) -> Runner:
        device = pick_device(self._settings.model.device)
        dtype = pick_dtype(self._settings.model.dtype, stored_dtype(source), device)
        model = load_source(source, device, dtype)
        return Runner(model, self._settings.eval.compile)


def workload(settings: Settings, sources: Sequence[Source]) -> TimedWork:
    """Return the workload that all models are timed on, at batch size 1.

    Raises:
        UsageError: prompt and new tokens exceed the positions of a model.
    """
    given, new = settings.eval.prompt_tokens, settings.eval.new_tokens
    prompt = given or DEFAULT_PROMPT
    for source in sources:
        limit = model_positions(source)
        if limit is None or prompt + new <= limit:
            continue
        if given is not None or new >= limit:
            shown = f"`eval.prompt_tokens` {given} and " if given is not None else ""
            raise UsageError(
                f"{shown}`eval.new_tokens` {new} exceed the {limit} positions of {source.name}.",
                f"Keep prompt and new tokens together at {limit} or less.",
            )
        prompt = limit - new
    return TimedWork(1, prompt, new, settings.eval.turns)
