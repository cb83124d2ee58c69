"""Measures a model on windows of text; partial sums are cached, so that a run can resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.evaluation.intervals import BLOCK, block_sums
from hisvd_cli.evaluation.perplexity import Sums, Windows
from hisvd_cli.evaluation.store import FORMAT_VERSION, Store
from hisvd_cli.modeling.divergence import token_divergences, token_losses
from hisvd_cli.modeling.passes import FinalStates, Head, Output, Pass, Placement
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.versions import versions

SAVE_SECONDS = 30.0
"""Interval between writes of partial sums."""


@dataclass(frozen=True)
class Reference:
    """A baseline on the same windows: its output head and its final hidden states."""

    head: Head
    states: FinalStates


@dataclass(frozen=True)
class Measurement:
    """A model to measure on windows of text, optionally against a baseline.

    Attributes:
        source: the model.
        windows: the text, tokenized for the model.
        how: how the model runs. Batch size and streaming do not change results and are not part of
            the key.
        store: the cache of sums.
        baseline: key of the measurement of the baseline; empty for none.
    """

    source: Source
    windows: Windows
    how: Placement
    store: Store
    baseline: str = ""

    @cached_property
    def key(self) -> str:
        """sha256 of everything that the sums depend on."""
        made_by = versions()
        about = (str(FORMAT_VERSION), str(BLOCK), made_by["torch"], made_by["transformers"])
        how = f"{self.how.dtype} {self.how.device.type}"
        return digest(*about, self.source.fingerprint, self.windows.key, how, self.baseline)

    def load(self) -> Sums | None:
        """Return the cached sums of the completed windows, or None; sums of another shape, from a
        damaged file, are ignored."""
        sums = self.store.load(self.key)
        count, blocks = self.windows.tokens.shape
        fits = sums is not None and sums.nats.shape[1] == blocks and len(sums) <= count
        whole = sums is not None and (sums.kl is not None) == bool(self.baseline)
        return sums if fits and whole else None

    def missing(self) -> int:
        """Return the number of windows that are not measured yet."""
        return len(self.windows.ids) - len(self.load() or ())

    def save(self, sums: Sums) -> None:
        """Write the sums of the completed windows. Raises OutputError."""
        self.store.save(self.key, self._about(), sums)
        if self.baseline:  # the likelihoods also serve a run without a baseline
            alone = replace(self, baseline="")
            if alone.missing() > self.windows.ids.shape[0] - len(sums):
                self.store.save(alone.key, alone._about(), Sums(sums.nats))

    def _about(self) -> dict[str, Any]:
        text = self.windows.text
        count, seqlen = self.windows.ids.shape
        return {
            "model": self.source.name,
            "fingerprint": self.source.fingerprint,
            "baseline": self.baseline or None,
            "dataset": text.name,
            "dataset_hash": text.digest,
            "tokens_sha256": self.windows.key,
            "windows": count,
            "seqlen": seqlen,
            "block": BLOCK,
            "dtype": dtype_name(self.how.dtype),
            "device": self.how.device.type,
            "versions": versions(),
        }


def measure(
    wanted: Measurement,
    model: Pass,
    step: Callable[[], None],
    *,
    reference: Reference | None = None,
    keep: FinalStates | None = None,
) -> Sums:
    """Measure the missing windows, of which there is at least one, and store the sums.

    Args:
        wanted: what to measure.
        model: the open model.
        step: called for each window.
        reference: the baseline to compare with.
        keep: for a baseline, where its final hidden states are kept; existing ones are reused.

    Returns:
        The sums of all windows.

    Raises:
        HisvdError: the model cannot be run, or the sums cannot be written.
    """
    sums = wanted.load()
    count = 0 if sums is None else len(sums)
    if keep is not None:
        count = min(count, keep.count())
    sums = sums.first(count) if sums and count else None
    saved = time.monotonic()
    for output in model.run(wanted.windows.ids[count:]):
        ids = wanted.windows.ids[count : count + len(output.logits)]
        if keep is not None:
            keep.keep(count, output.final)
        more = _sums_of(output, ids, count, reference)
        sums = more if sums is None else sums.joined(more)
        count += len(ids)
        if time.monotonic() - saved >= SAVE_SECONDS:
            wanted.save(sums)
            saved = time.monotonic()
        for _ in ids:
            step()
    if sums is None:
        raise ValueError("There are no windows to measure.")
    wanted.save(sums)
    return sums


def _sums_of(output: Output, ids: Tensor, first: int, reference: Reference | None) -> Sums:
    """Return the sums of a batch of windows ``[B, L]``; ``first`` is the index of its first."""
    on_device = ids.to(output.logits.device)
    pairs = zip(output.logits, on_device, strict=True)
    nats = _blocks([token_losses(logits, window) for logits, window in pairs])
    if reference is None:
        return Sums(nats)
    against = reference.head.logits(ids, reference.states.read(first, len(ids)))
    pairs = zip(against, output.logits, strict=True)
    kl, agreed = zip(*(token_divergences(one, other) for one, other in pairs), strict=True)
    return Sums(nats, _blocks(kl), _blocks(agreed))


def _blocks(windows: Any) -> Tensor:
    """Return the sums ``[B, K]`` over blocks of per-token values, one ``[L − 1]`` per window."""
    return block_sums(torch.stack(list(windows)).cpu())
