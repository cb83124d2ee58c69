"""Perplexity, bits per byte, KL divergence and agreement.

The texts of the data set are joined, tokenized once and split into non-overlapping windows of
``seqlen`` tokens; every token of a window but the first is predicted. A BOS token is added once, at
the start of the text, if the tokenizer adds one. Figures are ratios of sums over all windows:

- perplexity: exp of the mean negative log-likelihood per token;
- bits per byte: the negative log-likelihood in bits per UTF-8 byte of the predicted text, which is
  comparable between tokenizers;
- KL: mean KL(baseline ‖ model) in nats per token;
- agreement: share of tokens for which both models have the same most likely token.

A window with a non-finite loss makes the result non-finite; no window is skipped.

Legend: W windows of L tokens, K blocks of predicted tokens in each (see ``intervals``).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.calibration.text.datasets import Text
from hisvd_cli.calibration.text.tokens import count_windows, token_ends
from hisvd_cli.evaluation.intervals import (
    DRAWS,
    LEVEL,
    SEED,
    Interval,
    block_sums,
    draws_windows,
    interval,
    resampled,
    units,
)
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.files.fingerprints import digest

_LARGEST = 700.0  # nats; exp of more overflows


@dataclass(frozen=True)
class Windows:
    """A text, tokenized and split into windows.

    Attributes:
        text: the text.
        ids: tokens ``[W, L]``.
        spans: UTF-8 bytes of each predicted token ``[W, L − 1]``; None if the tokenizer has no
            offsets.
        bos: description of where a BOS token was added.
    """

    text: Text
    ids: Tensor
    spans: Tensor | None
    bos: str

    @cached_property
    def key(self) -> str:
        """sha256 of the tokens."""
        return digest(str(list(self.ids.shape)), self.ids.numpy().tobytes())

    @cached_property
    def tokens(self) -> Tensor:
        """Number of predicted tokens in each block ``[W, K]``."""
        return block_sums(torch.ones(len(self.ids), self.ids.shape[1] - 1))

    @cached_property
    def bytes(self) -> Tensor | None:
        """Bytes of the predicted tokens in each block ``[W, K]``; None without offsets."""
        return None if self.spans is None else block_sums(self.spans)


@dataclass(frozen=True)
class Sums:
    """Sums over blocks of tokens ``[W, K]`` of a model on windows.

    Attributes:
        nats: negative log-likelihoods.
        kl: KL(baseline ‖ model) in nats; None without a baseline.
        agreed: number of tokens whose most likely token is that of the baseline; None without a
            baseline.
    """

    nats: Tensor
    kl: Tensor | None = None
    agreed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.nats)

    def first(self, count: int) -> Sums:
        """Return the sums of the first ``count`` windows."""
        kl = None if self.kl is None else self.kl[:count]
        agreed = None if self.agreed is None else self.agreed[:count]
        return Sums(self.nats[:count], kl, agreed)

    def joined(self, more: Sums) -> Sums:
        """Return these sums followed by those of later windows."""
        return Sums(
            torch.cat([self.nats, more.nats]),
            _joined(self.kl, more.kl),
            _joined(self.agreed, more.agreed),
        )


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.cat([one, other])


@dataclass(frozen=True)
class PerplexityResult:
    """The results on one text, with everything needed to reproduce them.

    Attributes:
        kl: mean KL(baseline ‖ model) in nats per token; None without a baseline.
        agreement: share of tokens; None without a baseline.
        intervals: confidence interval by figure; None for a figure that is not finite, or if the
            text is too short.
        bootstrap: how the intervals were computed.
        dtype: the dtype of the forward passes.
    """

    dataset: str
    split: str
    perplexity: float | None
    tokens: int
    windows: int
    seqlen: int
    bos: str
    dataset_hash: str
    nonfinite_windows: list[int]
    bits_per_byte: float | None = None
    bytes: int | None = None
    kl: float | None = None
    agreement: float | None = None
    intervals: dict[str, Interval | None] | None = None
    bootstrap: dict[str, Any] | None = None
    dtype: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the result as JSON data, with null for a figure that is not finite."""
        return asdict(self)


def evaluation_windows(text: Text, source: Source, seqlen: int, windows: int) -> Windows:
    """Return the first ``windows`` windows of a text, or all for 0.

    Raises:
        DataError: the text is shorter than one window.
    """
    tokens, ends = token_ends(text, source)
    available = count_windows(tokens, seqlen, text.name, "eval.seqlen")
    count = min(windows, available) if windows else available
    ids = tokens[: count * seqlen].view(count, seqlen)
    spans = None if ends is None else ends[: count * seqlen].view(count, seqlen).diff()
    return Windows(text, ids, spans, _bos_handling(source, ids))


def _bos_handling(source: Source, ids: Tensor) -> str:
    bos = source.tokenizer.bos_token_id
    if bos is not None and int(ids[0, 0]) == bos:
        return "once, at the start of the text"
    return "none"


@dataclass(frozen=True)
class _Figure:
    """A ratio of sums, and the same ratio of each resample ``[D]``."""

    value: float
    draws: Tensor | None


def _figure(numerator: Tensor | None, denominator: Tensor | None) -> _Figure | None:
    if numerator is None or denominator is None or not denominator.sum():
        return None
    value = float(numerator.sum() / denominator.sum())
    return _Figure(value, resampled(numerator, denominator))


def result_of(windows: Windows, sums: Sums, dtype: str | None = None) -> PerplexityResult:
    """Return the figures of a model that ran in ``dtype`` from its sums."""
    bits = _figure(sums.nats / math.log(2), windows.bytes)
    mean = _figure(sums.nats, windows.tokens)
    kl, agreement = _figure(sums.kl, windows.tokens), _figure(sums.agreed, windows.tokens)
    figures = {"perplexity": _exponential(mean), "bits_per_byte": bits}
    figures |= {"kl": kl, "agreement": agreement}
    values = {
        name: figure.value if figure and math.isfinite(figure.value) else None
        for name, figure in figures.items()
    }
    finite = sums.nats.isfinite().all(1).tolist()
    seqlen = windows.ids.shape[1]
    return PerplexityResult(
        dataset=windows.text.name,
        split=windows.text.split,
        tokens=len(finite) * (seqlen - 1),
        windows=len(finite),
        seqlen=seqlen,
        bos=windows.bos,
        dataset_hash=windows.text.digest,
        nonfinite_windows=[i for i, good in enumerate(finite) if not good],
        bytes=None if windows.bytes is None else int(windows.bytes.sum()),
        intervals={
            name: interval(figure.draws) if figure else None for name, figure in figures.items()
        },
        bootstrap=_bootstrap(sums.nats),
        dtype=dtype,
        **values,
    )


def _exponential(mean: _Figure | None) -> _Figure | None:
    if mean is None:
        return None
    draws = None if mean.draws is None else mean.draws.exp()
    return _Figure(math.exp(mean.value) if mean.value < _LARGEST else math.inf, draws)


def _bootstrap(sums: Tensor) -> dict[str, Any]:
    unit = "windows" if draws_windows(sums) else "blocks of tokens"
    made = {"unit": unit, "units": len(units(sums))}
    return {**made, "draws": DRAWS, "seed": SEED, "level": LEVEL}


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two models on one text.

    Attributes:
        dataset: the text.
        figure: nats_per_token (the logarithm of the perplexity), kl or agreement.
        model: one model.
        other: the other model.
        difference: the figure of ``model`` minus that of ``other``.
        interval: confidence interval of the difference; None if the text is too short.
        better: the better model; None if the interval contains 0.
    """

    dataset: str
    figure: str
    model: str
    other: str
    difference: float
    interval: Interval | None
    better: str | None

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        return asdict(self)


def compare(windows: Windows, one: tuple[str, Sums], two: tuple[str, Sums]) -> list[Comparison]:
    """Return the comparisons of two named models on the same windows.

    Figures that are not finite are left out. KL and agreement are compared if both models were
    measured against a baseline.
    """
    (model, sums), (other, others) = one, two
    pairs = {
        "nats_per_token": (sums.nats, others.nats),
        "kl": (sums.kl, others.kl),
        "agreement": (sums.agreed, others.agreed),
    }
    found = []
    for figure, (ours, theirs) in pairs.items():
        if ours is None or theirs is None or not bool((ours - theirs).isfinite().all()):
            continue
        difference = ours - theirs
        bounds = interval(resampled(difference, windows.tokens))
        better = None
        if bounds and (bounds[0] > 0 or bounds[1] < 0):
            better = model if (bounds[0] > 0) == (figure == "agreement") else other
        mean = float(difference.sum() / windows.tokens.sum())
        found.append(Comparison(windows.text.name, figure, model, other, mean, bounds, better))
    return found
