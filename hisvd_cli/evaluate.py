"""Perplexity: non-overlapping windows, every predicted token counted, nothing skipped.

The text is joined, tokenized once and cut into windows of ``seqlen`` tokens; within a window each
token but the first is predicted. Perplexity is exp of the mean negative log-likelihood over all
predicted tokens. A window whose loss is not finite makes the result not finite.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hisvd_cli.data import Text, tokenize
from hisvd_cli.errors import DataError
from hisvd_cli.reporter import Reporter
from hisvd_cli.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 512  # positions whose logits are held in float32 at a time


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity on one text, with everything needed to get it again."""

    dataset: str
    split: str
    perplexity: float | None
    tokens: int
    windows: int
    seqlen: int
    bos: str
    dataset_hash: str
    nonfinite_windows: list[int]

    def document(self) -> dict[str, Any]:
        """Return the result as JSON data; a perplexity that is not finite is null there."""
        return asdict(self)


def evaluation_windows(text: Text, source: Source, seqlen: int, windows: int) -> Tensor:
    """Return the first ``windows`` windows ``[w, seqlen]`` of a text (all where it is 0).

    Raises:
        DataError: the text has not even one window.
    """
    tokens = tokenize(text, source)
    available = len(tokens) // seqlen
    if available == 0:
        raise DataError(
            f"'{text.name}' holds {len(tokens):,} tokens, too few for one window of {seqlen}.",
            f"Lower --seqlen to {len(tokens)} or less, or give a longer text.",
        )
    count = min(windows, available) if windows else available
    return tokens[: count * seqlen].view(count, seqlen)


def bos_handling(source: Source, windows: Tensor) -> str:
    """Say in words where the beginning-of-sequence token stands."""
    bos = source.tokenizer.bos_token_id
    if bos is not None and int(windows[0, 0]) == bos:
        return "once, at the start of the text"
    return "none"


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, windows: Tensor, batch: int, reporter: Reporter, label: str
) -> Tensor:
    """Return the summed negative log-likelihood (nats) of each window ``[w]`` in float64."""
    sums: list[Tensor] = []
    parts = windows.split(batch)
    with reporter.stage(label, len(parts)) as step:
        for ids in parts:
            on_device = ids.to(model.device)
            logits = model(input_ids=on_device, use_cache=False).logits
            sums += [_nll(row, target) for row, target in zip(logits, on_device, strict=True)]
            step()
    return torch.stack(sums)


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum the loss of one window: logits ``[L, vocabulary]``, ids ``[L]``."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(ids) - 1, _ROWS):
        end = min(start + _ROWS, len(ids) - 1)
        total += torch.nn.functional.cross_entropy(
            logits[start:end].float(), ids[start + 1 : end + 1], reduction="sum"
        ).cpu()
    return total


def perplexity(
    model: PreTrainedModel,
    source: Source,
    text: Text,
    *,
    seqlen: int,
    windows: int,
    batch: int,
    reporter: Reporter,
) -> PerplexityResult:
    """Measure the perplexity of a model on a text.

    Args:
        model: the model, on its device.
        source: where its tokenizer comes from.
        text: evaluation text.
        seqlen: tokens per window.
        windows: the first so many; 0 takes all.
        batch: windows per forward pass.
        reporter: told of each batch.

    Raises:
        DataError: the text is shorter than one window.
    """
    ids = evaluation_windows(text, source, seqlen, windows)
    label = f"Perplexity on {text.name.rpartition('/')[2]}"
    losses = window_losses(model, ids, batch, reporter, label)
    predicted = ids.shape[0] * (seqlen - 1)
    mean = float(losses.sum()) / predicted
    value = math.exp(mean) if math.isfinite(mean) and mean < 700 else None
    return PerplexityResult(
        dataset=text.name,
        split=text.split,
        perplexity=value,
        tokens=predicted,
        windows=ids.shape[0],
        seqlen=seqlen,
        bos=bos_handling(source, ids),
        dataset_hash=text.digest,
        nonfinite_windows=[i for i, x in enumerate(losses.tolist()) if not math.isfinite(x)],
    )
