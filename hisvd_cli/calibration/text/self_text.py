"""Calibration text that is sampled from the model itself.

Each row starts with the BOS token and is sampled from the full distribution at temperature 1, with
no top-k, top-p, penalty or end token, whatever the generation settings of the model.

Rows are sampled in fixed batches, each with its own seed, and each batch is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from hisvd_cli.calibration.text.token_ids import known_ids
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_source
from hisvd_cli.utils.device import seeded
from hisvd_cli.utils.errors import NumericalError, OutputError, reason
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.fingerprints import cache_root, digest
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors, write_tensors
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEEDS = 1 << 63
ROWS = 16
"""Rows per batch. The sampled text depends on it, so it is not configurable."""


def sample_self(
    source: Source,
    samples: int,
    seqlen: int,
    seed: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> Tensor:
    """Return tokens sampled from a model, from the cache if possible.

    The cache does not depend on the device, so that a calibration can resume on another one.

    Args:
        source: the model.
        samples: number of rows.
        seqlen: tokens per row, including the given first one.
        seed: random seed.
        device: where the model runs.
        dtype: dtype of the model.
        reporter: receives progress.

    Returns:
        Tokens ``[samples, seqlen]`` on the CPU.

    Raises:
        NumericalError: the distribution of the model is not finite.
    """
    key = digest(source.fingerprint, f"{samples} {seqlen} {seed} {dtype} {_first_token(source)}")
    folder = cache_root() / "self" / key[:16]
    writer = _Writer(source, device, dtype)
    rows: list[Tensor] = []
    starts = range(0, samples, ROWS)
    with reporter.stage("Sampling text", len(starts)) as step:
        for index, start in enumerate(starts):
            path = folder / f"batch-{index:05d}.safetensors"
            if intact(path):
                batch = read_tensors(path, AGAIN)[0]["tokens"]
            else:
                batch = writer.draw(
                    min(ROWS, samples - start), seqlen, (seed * len(starts) + index) % _SEEDS
                )
                with suppress(OutputError):  # without a cache, the batch is sampled again
                    write_tensors(path, {"tokens": batch}, {})
            rows.append(batch)
            step()
    return torch.cat(rows)


class _Writer:
    """Samples from a model, which is loaded on first use."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self._source = source
        self._device = device
        self._dtype = dtype

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_source(self._source, self._device, self._dtype)

    def draw(self, rows: int, seqlen: int, seed: int) -> Tensor:
        """Return sampled tokens ``[rows, seqlen]``. Raises NumericalError, DataError."""
        from transformers import GenerationConfig

        first = known_ids(torch.full((rows, 1), _first_token(self._source)), self._source)
        start = first.to(self._device)
        free = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=seqlen,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        # Otherwise generate fills unset values from the model's own configuration.
        self._model.generation_config = free
        generate = cast(Callable[..., Tensor], self._model.generate)
        try:
            with seeded(seed, self._device):
                drawn = generate(
                    start, attention_mask=torch.ones_like(start), generation_config=free
                )
        except RuntimeError as error:  # from torch, for probabilities that are NaN, inf or all 0
            raise NumericalError(
                f"Cannot sample text from {self._source.name}: {reason(error)}",
                "Set `model.dtype` to float32.",
            ) from error
        return drawn.cpu()


def _first_token(source: Source) -> int:
    """Return the BOS token, else the EOS token, else 0."""
    tokenizer = source.tokenizer
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)
