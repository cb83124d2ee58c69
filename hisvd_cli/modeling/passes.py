"""Forward passes over windows of text, with the whole model or one block at a time in memory.

Both give the same logits. The decoder outputs of a baseline are stored on disk, in their own
precision: they are smaller than logits by a factor of vocabulary ÷ width, and the output head
recomputes the same logits. One pass of the baseline thus serves any number of models, with only
one model in memory at a time.

Legend: N windows of L tokens, B of them in a batch; d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.decoding import logits_from_states
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.decoders import decoder_blocks, decoder_of, language_model
from hisvd_cli.modeling.structure.skeleton import build_stored_model
from hisvd_cli.modeling.structure.tensors import drop_weights
from hisvd_cli.modeling.whole_model import load_source
from hisvd_cli.utils.errors import UnsupportedModelError
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Output:
    """The output for a batch of windows: logits ``[B, L, V]`` and decoder output ``[B, L, d]``
    (None if transformers cannot identify the model's decoder)."""

    logits: Tensor
    final: Tensor | None


class Pass(Protocol):
    """A model that can be run on windows."""

    def run(self, ids: Tensor) -> Iterator[Output]:
        """Yield the output of each batch of windows ``[N, L]``, in order."""
        ...


@dataclass(frozen=True)
class Placement:
    """How a model is run.

    Attributes:
        device: device of forward passes.
        dtype: precision of forward passes.
        batch: windows per forward pass.
        streamed: keep one block in memory at a time.
        states_bytes: limit for the hidden states of windows that are streamed together.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    streamed: bool = False
    states_bytes: int = 1 << 30


class Resident:
    """A model that is in memory as a whole."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self._model = language_model(model)
        self._batch = batch
        self._tap = _Tap(model)

    def run(self, ids: Tensor) -> Iterator[Output]:
        """Yield the output of each batch."""
        for part in ids.split(self._batch):
            with torch.inference_mode(), self._tap.open():
                logits = self._model(input_ids=part.to(self._model.device), use_cache=False).logits
            yield Output(logits, self._tap.take())


class Streamed:
    """A model on disk, with one block at a time in memory.

    Windows are processed together as long as their hidden states fit into ``states_bytes``, so
    that weights are read rarely.
    """

    def __init__(self, walk: BlockWalk, states_bytes: int) -> None:
        self._walk = walk
        self._states_bytes = states_bytes
        self._tap = _Tap(walk.model)

    def run(self, ids: Tensor) -> Iterator[Output]:
        """Yield the output of each batch. Raises NumericalError for weights that are not finite."""
        walk = self._walk
        width = int(walk.model.config.get_text_config().hidden_size)
        together = self._states_bytes // (ids.shape[1] * width * walk.dtype.itemsize)
        for chunk in ids.split(max(walk.batch, together // walk.batch * walk.batch)):
            walk.embed(chunk)
            for index in range(len(walk.layers)):
                walk.load(index)
                walk.advance(index)
                walk.free(index)
            with walk.whole_outside():
                for part, state in zip(
                    chunk.split(walk.batch), walk.hidden.split(walk.batch), strict=True
                ):
                    with torch.no_grad(), self._tap.open():
                        logits = walk.logits(part.to(walk.device), state.to(walk.device))
                    yield Output(logits, self._tap.take())


class Head:
    """Computes logits from decoder outputs."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device

    def logits(self, ids: Tensor, final: Tensor) -> Tensor:
        """Return the logits ``[B, L, V]`` for tokens ``[B, L]`` and their decoder output ``[B, L,
        d]``."""
        with torch.inference_mode():
            return logits_from_states(self._model, ids.to(self._device), final.to(self._device))


class _Tap:
    """Captures the last output of a model's decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = decoder_of(model)
        self._decoder: nn.Module | None = None if decoder is model else decoder
        self._seen: Tensor | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Capture outputs while the body runs."""
        if self._decoder is None:
            yield
            return
        handle = self._decoder.register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def take(self) -> Tensor | None:
        """Return the captured output and forget it."""
        seen, self._seen = self._seen, None
        return seen

    def _note(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._seen = output[0]


@contextmanager
def open_pass(source: Source, how: Placement) -> Iterator[Pass]:
    """Open a model, dense or compressed, for running; its memory is freed after the body.

    Raises:
        SourceError: weights are missing or damaged, or have the wrong shape.
        UnsupportedModelError: the model cannot be built or streamed.
    """
    if how.streamed:
        yield Streamed(_walk(source, how), how.states_bytes)
        return
    model = load_source(source, how.device, how.dtype)
    yield Resident(model, how.batch)


@contextmanager
def open_head(source: Source, how: Placement) -> Iterator[Head]:
    """Open the output head of a model, and keep only that in memory while the body runs.

    Raises:
        HisvdError: as for :func:`open_pass`.
    """
    if how.streamed:
        walk = _walk(source, how)
        with walk.whole_outside():
            yield Head(walk.model, how.device)
        return
    model = load_source(source, how.device, how.dtype)
    drop_weights(decoder_blocks(model)[1], recurse=True)
    yield Head(model, how.device)


def _walk(source: Source, how: Placement) -> BlockWalk:
    model = build_stored_model(source, how.dtype)
    # Non-finite windows are reported in the result and do not stop the others.
    return BlockWalk(source, how.device, how.dtype, how.batch, model=model, refuse_nonfinite=False)


@dataclass(frozen=True)
class FinalStates:
    """Decoder outputs on disk, one file with ``[L, d]`` per window."""

    folder: Path

    def _path(self, window: int) -> Path:
        return self.folder / f"window-{window:06d}.safetensors"

    def count(self) -> int:
        """Return the number of consecutive windows, from the first, with an intact file."""
        count = 0
        while intact(self._path(count)):
            count += 1
        return count

    def keep(self, first: int, final: Tensor | None) -> None:
        """Write the outputs ``[B, L, d]`` of the windows that begin with ``first``.

        Raises:
            UnsupportedModelError: ``final`` is None.
            OutputError: a file cannot be written.
        """
        if final is None:
            raise UnsupportedModelError(
                "The decoder of the baseline cannot be identified, so nothing can be compared with "
                "it.",
                "Evaluate without `eval.baseline`; perplexity does not need the decoder.",
            )
        for i, state in enumerate(final):
            write_tensors(self._path(first + i), {"final": state}, {})

    def read(self, first: int, count: int) -> Tensor:
        """Return the outputs ``[count, L, d]`` of the windows that begin with ``first``.

        Raises:
            SourceError: a file is missing or damaged.
        """
        paths = [self._path(window) for window in range(first, first + count)]
        return torch.stack([read_tensors(path, AGAIN)[0]["final"] for path in paths])
