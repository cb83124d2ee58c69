"""Measures models on the same texts and compares them with one pass of a baseline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from hisvd_cli.calibration.text.datasets import Text
from hisvd_cli.evaluation.measurement import Measurement, Reference, measure
from hisvd_cli.evaluation.perplexity import Sums, Windows, evaluation_windows
from hisvd_cli.evaluation.store import open_store
from hisvd_cli.modeling.passes import FinalStates, Head, Placement, open_head, open_pass
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.whole_models import streamed_states
from hisvd_cli.pipelines.samples import stored_dtype
from hisvd_cli.utils.device import free_memory, pick_device, pick_dtype
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.files.scratch import scratch_folder
from hisvd_cli.utils.progress import Reporter

_SHARE = 0.8  # of free memory for weights; logits and activations need the rest


@dataclass(frozen=True)
class Measured:
    """Results of a model on one text."""

    windows: Windows
    sums: Sums
    dtype: str


class TextRunner:
    """Measures several models on the same texts.

    Args:
        resolved: the settings.
        texts: the texts.
        seqlen: tokens per window.
        reporter: receives progress and warnings.
        fresh: ignore stored results.
    """

    def __init__(
        self,
        resolved: Resolved,
        texts: Sequence[Text],
        seqlen: int,
        reporter: Reporter,
        fresh: bool = False,
    ) -> None:
        self._resolved = resolved
        self._settings = resolved.settings
        self._texts = texts
        self._seqlen = seqlen
        self._reporter = reporter
        self._fresh = fresh
        self._store = open_store()
        self._dense: list[Measurement] = []
        self._opened = ExitStack()
        self._head: Head | None = None
        self._states: list[FinalStates] = []

    @contextmanager
    def against(self, baseline: Source | None) -> Iterator[None]:
        """Compare models measured in the body with a baseline, if there is one.

        Raises:
            DataError: a text is too short.
        """
        if baseline is None:
            yield
            return
        self._dense = self._requested(baseline)
        with self._opened:
            yield

    def baseline(self) -> list[Measured]:
        """Return the results of the baseline, empty without one."""
        return self._measured(self._dense, [None] * len(self._dense))

    def measure(self, source: Source) -> list[Measured]:
        """Measure a model on all texts.

        Raises:
            HisvdError: the model cannot be run, or a text is too short.
        """
        wanted = self._requested(source)
        for i, dense in enumerate(self._dense):
            if self._comparable(wanted[i], dense):
                wanted[i] = replace(wanted[i], baseline=dense.key)
                self._forget(wanted[i])
        compared = [i for i, each in enumerate(wanted) if each.baseline and each.missing()]
        references = self._references() if compared else []
        return self._measured(
            wanted, [references[i] if i in compared else None for i in range(len(wanted))]
        )

    def _requested(self, source: Source) -> list[Measurement]:
        how = self._placement(source)
        windows = self._settings.eval.windows
        requested = [
            Measurement(
                source, evaluation_windows(text, source, self._seqlen, windows), how, self._store
            )
            for text in self._texts
        ]
        for each in requested:
            self._forget(each)
        return requested

    def _forget(self, measurement: Measurement) -> None:
        if self._fresh:
            self._store.forget(measurement.key)

    def _placement(self, source: Source) -> Placement:
        device = pick_device(self._settings.model.device)
        dtype = pick_dtype(self._settings.model.dtype, stored_dtype(source), device)
        baseline = self._dense[0].source if self._dense else None
        states = streamed_states(self._resolved, source, self._seqlen, baseline)
        if states is not None:
            return Placement(device, dtype, self._settings.eval.batch, True, states)
        streamed = self._settings.eval.stream == "on"
        if self._settings.eval.stream == "auto":
            free = free_memory(device)
            streamed = _weight_bytes(source, dtype) > _SHARE * free
            if streamed:
                self._reporter.note(
                    f"{source.name} does not fit in memory: running one block at a time."
                )
        return Placement(device, dtype, self._settings.eval.batch, streamed)

    def _comparable(self, wanted: Measurement, dense: Measurement) -> bool:
        """Return whether two models have the same tokens; warn if they do not."""
        if wanted.windows.key == dense.windows.key and _vocabulary(wanted) == _vocabulary(dense):
            return True
        self._reporter.warn(
            f"{wanted.source.name} and its baseline {dense.source.name} have different tokenizers: "
            "no KL and no agreement; compare bits per byte, not perplexities."
        )
        return False

    def _measured(
        self, wanted: Sequence[Measurement], references: Sequence[Reference | None]
    ) -> list[Measured]:
        missing = sum(each.missing() for each in wanted)
        if missing:
            source, how = wanted[0].source, wanted[0].how
            label = f"Evaluating {Path(source.name).name}"
            with (
                open_pass(source, how) as model,
                self._reporter.stage(label, missing) as step,
            ):
                for each, reference in zip(wanted, references, strict=True):
                    if each.missing():
                        measure(each, model, step, reference=reference)
        return [
            Measured(each.windows, each.load() or _lost(each), dtype_name(each.how.dtype))
            for each in wanted
        ]

    def _references(self) -> list[Reference]:
        """Return the baseline's head and final hidden states, from a single pass."""
        if self._head is None:
            folder = self._opened.enter_context(self._states_folder())
            self._states = [FinalStates(folder / each.key[:16]) for each in self._dense]
            self._keep_states()
            opened = open_head(self._dense[0].source, self._dense[0].how)
            self._head = self._opened.enter_context(opened)
        return [Reference(self._head, states) for states in self._states]

    @contextmanager
    def _states_folder(self) -> Iterator[Path]:
        """Yield a folder for the baseline's hidden states, removed when the body ends.

        An interrupted run leaves the folder, and the next run resumes from it. If another run uses
        it, or the cache is not writable, a temporary folder is used.
        """
        home = self._store.folder
        lock = FileLock(home / ".states.lock")
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            with scratch_folder(self._settings.model.scratch) as own:
                yield own
            return
        try:
            yield home / "states"
            shutil.rmtree(home / "states", ignore_errors=True)
        finally:
            with suppress(OSError):
                Path(lock.lock_file).unlink()  # while the lock is held, as in building()
            lock.release()

    def _keep_states(self) -> None:
        pairs = list(zip(self._dense, self._states, strict=True))
        missing = sum(len(each.windows.ids) - states.count() for each, states in pairs)
        if not missing:
            return
        source, how = self._dense[0].source, self._dense[0].how
        label = f"Evaluating {Path(source.name).name}"
        with open_pass(source, how) as model, self._reporter.stage(label, missing) as step:
            for each, states in pairs:
                if states.count() < len(each.windows.ids):
                    measure(each, model, step, keep=states)


def _lost(measurement: Measurement) -> Sums:
    raise RuntimeError(f"{measurement.store.path(measurement.key)} was removed during the run.")


def _vocabulary(measurement: Measurement) -> int:
    return int(measurement.source.config.get_text_config().vocab_size)


def _weight_bytes(source: Source, dtype: torch.dtype) -> int:
    """Return the bytes of a model's weights in memory."""
    return sum(torch.Size(i.shape).numel() for i in source.weights.infos.values()) * dtype.itemsize
