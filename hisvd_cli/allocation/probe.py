"""Measurements of a truncated model, for allocators that need them.

Truncating a sublayer in block b does not affect earlier blocks. The dense inputs of every block are
therefore kept, and only the blocks from b on run again.

Legend: S windows of L tokens; d hidden width; hidden states ``[S, L, d]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hisvd_cli.modeling.corrected import take_corrected
from hisvd_cli.modeling.divergence import kl_divergence
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.whole_model import load_source
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.checksums import seal, sealed
from hisvd_cli.utils.files.json_files import read_json, write_json
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Factors = Callable[[str], tuple[Tensor, Tensor]]
"""``name -> (U [m, k], V [k, n])`` with full rank k, best component first."""

_ROWS = 512  # positions whose distributions are in float32 at the same time
_LARGEST = 700.0  # nats; exp overflows just above


class ModelProbe:
    """The ``Probe`` of the allocators: measures a model with truncated sublayers.

    Args:
        source: the dense model; it is loaded at the first measurement.
        members: sublayer → its linear modules, in the order of the spectra; a stack of experts has
            several.
        windows: probe text ``[S, L]``.
        factors: returns the full-rank factors of a linear module.
        device: device of the model.
        dtype: dtype of the forward passes.
        store: file of the cached measurements.
        key: hash of everything that measurements depend on; those with another key are dropped.
        reporter: receives a note for each new measurement.
    """

    def __init__(
        self,
        source: Source,
        members: Mapping[str, Sequence[str]],
        windows: Tensor,
        factors: Factors,
        *,
        device: torch.device,
        dtype: torch.dtype,
        store: Path,
        key: str,
        reporter: Reporter,
    ) -> None:
        self._members = members
        self._windows = windows
        self._factors = factors
        self._device = device
        self._load = partial(_Loaded, source, windows, device, dtype)
        self._loaded: _Loaded | None = None
        self._store = store
        self._key = key
        self._answers = _read(store, key)
        self._reporter = reporter
        self._soft: dict[str, _SoftMask] = {}

    def perplexity(self, name: str, rank: int) -> float:
        """Return the perplexity on the probe text with one sublayer truncated to ``rank``."""
        return self._answer(f"perplexity {name} {rank}", name, rank, _Loaded.perplexity)

    def divergence(self, name: str, rank: int) -> float:
        """Return the mean KL(dense ‖ truncated) in nats per token."""
        return self._answer(f"divergence {name} {rank}", name, rank, _Loaded.divergence)

    def soft_divergence(
        self, positions: Sequence[float], width: float, step: int
    ) -> tuple[float, list[float]]:
        """Return the mean KL divergence with soft masks, and its gradient by position."""
        model = self._model()
        taken = [torch.tensor(p, requires_grad=math.isfinite(p)) for p in positions]
        with self._softened(model, taken, width), torch.enable_grad():
            loss = model.divergence_of(step % len(self._windows))
        moving = [p for p in taken if p.requires_grad]
        found = iter(torch.autograd.grad(loss, moving)) if moving else iter(())
        value = float(loss.detach())
        self._reporter.note(f"Step {step + 1}: divergence {value:.4f} nats per token.")
        return value, [float(next(found)) if p.requires_grad else 0.0 for p in taken]

    @contextmanager
    def _softened(
        self, model: _Loaded, positions: Sequence[Tensor], width: float
    ) -> Iterator[None]:
        handles = []
        try:
            for members, position in zip(self._members.values(), positions, strict=True):
                for name in members if position.requires_grad else ():
                    if name not in self._soft:
                        self._soft[name] = _SoftMask(
                            *self._factors(name), model.dtype, self._device
                        )
                    mask = partial(self._soft[name].output, position, width)
                    handles.append(model.linear(name).register_forward_hook(mask))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _model(self) -> _Loaded:
        self._loaded = self._loaded or self._load()
        return self._loaded

    def _answer(
        self, key: str, name: str, rank: int, measure: Callable[[_Loaded, str], float]
    ) -> float:
        if key not in self._answers:
            model = self._model()
            with ExitStack() as truncated:
                for member in self._members[name]:
                    u, v = self._factors(member)
                    truncated.enter_context(model.replaced(member, u[:, :rank] @ v[:rank]))
                self._answers[key] = measure(model, name)
            with suppress(OutputError):  # the cache is optional
                write_json(self._store, {"key": self._key, "answers": self._answers})
                seal(self._store)
            self._reporter.note(f"Measured {key}: {self._answers[key]:.5g}.")
        return self._answers[key]


def _read(store: Path, key: str) -> dict[str, float]:
    if not sealed(store):
        return {}
    try:
        document = read_json(store)
        return dict(document["answers"]) if document["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class _SoftMask:
    """Full-rank factors of a sublayer, in the dtype of the model, with a soft mask."""

    def __init__(self, u: Tensor, v: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._u, self._v = u.to(device, dtype), v.to(device, dtype)
        self._index = torch.arange(v.shape[0], device=device)

    def output(
        self,
        position: Tensor,
        width: float,
        module: nn.Linear,
        args: tuple[Tensor, ...],
        _output: Tensor,
    ) -> Tensor:
        """Return the output of the linear layer with component i weighted by
        ``sigmoid((position − i − ½) / (width·k))``."""
        scale = width * len(self._index)
        mask = torch.sigmoid((position.to(self._index.device) - self._index - 0.5) / scale)
        hidden = nn.functional.linear(args[0], self._v) * mask.to(self._v.dtype)
        return nn.functional.linear(hidden, self._u, module.bias)


class _Loaded:
    """The dense model with the inputs of all blocks and the output of the last."""

    def __init__(
        self, source: Source, windows: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self._model: PreTrainedModel = load_source(source, device, dtype).requires_grad_(False)
        take_corrected(source, self._model)
        self._prefix, self._layers = decoder_blocks(self._model)
        self._windows = windows.to(device)
        # Inputs of each block, and output of the last: [blocks + 1][S] of [1, L, d].
        self._entered: list[list[Tensor]] = [[] for _ in range(len(self._layers) + 1)]
        self._tuples = False
        with self._recording():
            for ids in self._windows:
                self._model.get_decoder()(input_ids=ids[None], use_cache=False)

    def linear(self, name: str) -> nn.Linear:
        """Return a linear module."""
        return cast(nn.Linear, self._model.get_submodule(name))

    @contextmanager
    def replaced(self, name: str, weight: Tensor) -> Iterator[None]:
        """Replace the weight of a linear module while the body runs."""
        linear = self.linear(name)
        kept = linear.weight
        linear.weight = nn.Parameter(weight.to(kept.device, kept.dtype), requires_grad=False)
        try:
            yield
        finally:
            linear.weight = kept

    @torch.no_grad()
    def perplexity(self, name: str) -> float:
        """Return the perplexity of all windows with the current weight of ``name``."""
        total = 0.0
        for window, ids in enumerate(self._windows):
            logits = self._logits(window, self._block(name))[:-1].float()
            total += float(nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        return math.exp(min(total / self._windows[:, 1:].numel(), _LARGEST))

    @torch.no_grad()
    def divergence(self, name: str) -> float:
        """Return the mean KL divergence of all windows with the current weight of ``name``."""
        first = self._block(name)
        parts = [self.divergence_of(window, first) for window in range(len(self._windows))]
        return float(torch.stack(parts).mean())

    def divergence_of(self, window: int, first: int = 0) -> Tensor:
        """Return the mean KL divergence of one window, run from block ``first`` on."""
        with torch.no_grad():
            dense = self._logits(window, len(self._layers))
        other = self._logits(window, first)
        parts = [
            kl_divergence(p.float().log_softmax(-1), q.float().log_softmax(-1))
            for p, q in zip(dense.split(_ROWS), other.split(_ROWS), strict=True)
        ]
        return torch.cat(parts).mean()

    def _block(self, name: str) -> int:
        return int(name[len(self._prefix) + 1 :].partition(".")[0])

    def _logits(self, window: int, first: int) -> Tensor:
        """Return logits ``[L, vocabulary]`` of a window, run from block ``first`` on."""
        with self._skipping(first, window):
            ids = self._windows[window][None]
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits

    @contextmanager
    def _skipping(self, first: int, window: int) -> Iterator[None]:
        """Replace the blocks before ``first`` by their dense result."""

        def stub(*_args: Any, **_kwargs: Any) -> Tensor | tuple[Tensor]:
            state = self._entered[first][window]
            return (state,) if self._tuples else state

        for layer in self._layers[:first]:
            layer.forward = stub
        try:
            yield
        finally:
            for layer in self._layers[:first]:
                del layer.forward

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep the inputs of every block while the body runs, without gradients."""

        def record(index: int, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            self._entered[index].append(args[0] if args else kwargs["hidden_states"])
            if index + 1 == len(self._layers):
                self._entered[-1].append(output[0] if self._tuples else output)

        handles = [
            layer.register_forward_hook(partial(record, i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
