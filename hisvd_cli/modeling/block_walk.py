"""Runs the decoder blocks of a model one at a time, with one block in memory.

The model is built on the meta device. A first pass with stubs in place of the blocks records the
arguments of each block (masks, positions, rotary embeddings), so that the model's own forward pass
need not be reimplemented. Then each block is loaded from disk, run and freed in turn.

Legend: S sequences, L tokens each, d hidden width; hidden states ``[S, L, d]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hisvd_cli.modeling.block_arguments import Recording, stubbed
from hisvd_cli.modeling.hidden_states import StatesHome
from hisvd_cli.modeling.overflow import all_finite, overflow_hint
from hisvd_cli.modeling.structure.decoders import decoder_blocks, decoder_of, language_model
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.tensors import drop_weights, read_tensor, tensor_names
from hisvd_cli.utils.errors import NumericalError, UnsupportedModelError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source


PROBE = -1
"""Start of the batch that consists of the first sequence alone."""


_BLOCK_FAULTS = (TypeError, ValueError, AttributeError, LookupError, NotImplementedError)
"""What the code of a block raises if it is not given what it needs."""


class _ReachedError(Exception):
    """Stops a forward pass after the input of a module was captured."""


class BlockWalk:
    """Loads, runs and frees the blocks of a model one at a time.

    Args:
        source: the model.
        device: device on which blocks run.
        dtype: dtype in which blocks run.
        batch: sequences per forward pass.
        home: storage of the hidden states; by default on the device.
        model: structure on the meta device, if it differs from the dense model of the config.
        refuse_nonfinite: raise an error if the output of a block is not finite.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        home: StatesHome | None = None,
        *,
        model: PreTrainedModel | None = None,
        refuse_nonfinite: bool = True,
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.batch = batch
        self.home = home or StatesHome(device)
        self.model = (model or build_meta_model(source, dtype)).requires_grad_(False)
        self._refuse_nonfinite = refuse_nonfinite
        self.prefix, self.layers = decoder_blocks(self.model)
        self.names = tensor_names(self.model, source)
        self._shapes = {name: t.shape for name, t in self.model.state_dict().items()}
        self.hidden = torch.empty(0)
        decoder, name = decoder_of(self.model), type(self.model).__name__
        self._language_model = language_model(self.model)
        self._recording = Recording(decoder, self.layers, name)

    @torch.no_grad()
    def embed(self, tokens: Tensor, compute_hidden: bool = True) -> None:
        """Embed ``tokens [S, L]`` into hidden states, and record the arguments of each block.

        Args:
            tokens: token ids.
            compute_hidden: False only records, for a walk that resumes from stored hidden states.
        """
        if not len(tokens):  # there are more processes than sequences
            return
        self._fill_outside()
        # For ``probe``, which runs one sequence.
        self._recording.record(tokens[:1].to(self.device), PROBE)
        for start in range(0, len(tokens), self.batch):
            ids = tokens[start : start + self.batch]
            state = self._recording.record(ids.to(self.device), start)
            if compute_hidden:
                self._keep(start, state, len(tokens))
        self._empty_outside()

    @property
    def carries(self) -> bool:
        """Whether blocks pass more than hidden states on; known after :meth:`embed`. Such a walk
        has to run all blocks in order."""
        return self._recording.carries

    def _keep(self, start: int, state: Tensor, count: int) -> None:
        if start == 0:  # allocated at once: concatenating parts would need twice the memory
            self.hidden = self.home.take((count, *state.shape[1:]), state.dtype)
        self.hidden[start : start + len(state)] = state
        self.home.settle()

    def load(self, index: int) -> nn.Module:
        """Load block ``index`` from disk and return it.

        Raises:
            SourceError: a tensor cannot be read, or has the wrong shape.
            NumericalError: a tensor is not finite.
        """
        layer = self.layers[index]
        name = f"{self.prefix}.{index}."
        tensors = {local: self._read(name + local) for local in layer.state_dict()}
        layer.load_state_dict(tensors, strict=True, assign=True)
        return layer

    def probe(self, index: int) -> None:
        """Run the loaded block ``index`` on the first sequence, for its hooks; hidden states are
        not changed."""
        self._run(index, self.hidden[:1].to(self.device), PROBE)

    def observe(self, index: int) -> None:
        """Run the loaded block ``index`` on all hidden states, for its hooks, without changing
        them. Raises NumericalError."""
        for start in range(0, len(self.hidden), self.batch):
            self._run(index, self.hidden[start : start + self.batch].to(self.device), start)

    def advance(self, index: int) -> None:
        """Run the loaded block ``index`` on all hidden states, in place.

        Raises:
            NumericalError: the output is not finite.
        """
        for start in range(0, len(self.hidden), self.batch):
            part = self.hidden[start : start + self.batch]
            part.copy_(self._run(index, part.to(self.device), start))
            self.home.settle()

    @torch.no_grad()
    def entering(
        self, index: int, start: int, part: Tensor, modules: Sequence[nn.Module]
    ) -> Tensor:
        """Run the loaded block ``index`` up to the first of ``modules``, and return the input of
        that module.

        Args:
            index: the block.
            start: index of the first sequence.
            part: its input ``[B, L, d]``, a chunk of ``batch`` sequences (the last may be smaller).
            modules: modules of the block, at least one of which is called.
        """
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _ReachedError

        handles = [module.register_forward_pre_hook(stop) for module in modules]
        try:
            with suppress(_ReachedError):
                self._forward(index, part.to(self.device), start)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    def reverse(self, index: int, start: int, part: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at the input of the loaded block ``index``.

        Args:
            index: the block.
            start: index of the first sequence.
            part: its input ``[B, L, d]``, a chunk of ``batch`` sequences (the last may be smaller).
            gradient: the gradient at its output, of the same shape.
        """
        entered = part.to(self.device, self.dtype).requires_grad_()
        with torch.enable_grad():
            state = self._forward(index, entered, start)
        return torch.autograd.grad(state, entered, gradient.to(self.device))[0]

    def loss_gradient(self, ids: Tensor, state: Tensor) -> Tensor:
        """Return the gradient of the summed loss at the last block's output.

        Must be called after :meth:`embed`, within :meth:`whole_outside`.

        Args:
            ids: tokens ``[1, L]``.
            state: the last block's output for them ``[1, L, d]``.

        Raises:
            NumericalError: the loss is not finite.
        """
        leaf = state.to(self.device, self.dtype).requires_grad_()
        on_device = ids.to(self.device)
        with torch.enable_grad():
            logits = self.logits(on_device, leaf)[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, on_device[0, 1:], reduction="sum")
        if not bool(loss.isfinite()):
            raise NumericalError("The loss is NaN or infinite.", overflow_hint(self.dtype))
        return torch.autograd.grad(loss, leaf)[0]

    def logits(self, ids: Tensor, state: Tensor) -> Tensor:
        """Return the logits ``[B, L, vocabulary]`` for the last block's output.

        Must be called after :meth:`embed`, within :meth:`whole_outside`.

        Args:
            ids: tokens ``[B, L]``, on the walk's device.
            state: the last block's output for them ``[B, L, d]``.
        """
        given = self._recording.from_rows(state)

        def stub(*_args: Any, **_kwargs: Any) -> Any:
            return self._recording.returned(given)

        with stubbed(self.layers, stub):
            logits: Tensor = self._language_model(input_ids=ids, use_cache=False).logits
        return logits

    def _forward(self, index: int, part: Tensor, start: int) -> Tensor:
        given = self._recording.of(index, start, len(part), self.device)
        if given is None:  # not run on text
            return part
        try:
            out = self.layers[index](self._recording.from_rows(part), *given[0], **given[1])
        except _BLOCK_FAULTS as error:
            raise UnsupportedModelError(
                f"Block {index} of {type(self.model).__name__} cannot be run on its own: "
                f"{reason(error)}",
                "It may need results of earlier blocks that are not hidden states.",
            ) from error
        return self._recording.keep(index, start, out)

    @torch.no_grad()
    def _run(self, index: int, part: Tensor, start: int) -> Tensor:
        state = self._forward(index, part, start)
        if self._refuse_nonfinite and not all_finite(state):
            raise NumericalError(
                f"The output of block {index} is NaN or infinite.", overflow_hint(self.dtype)
            )
        return state

    def free(self, index: int) -> None:
        """Free the memory of block ``index``."""
        drop_weights(self.layers[index], recurse=True)

    def _read(self, name: str) -> Tensor:
        stored, expected = self.names[name], self._shapes[name]
        return read_tensor(self.source, stored, name, expected, self.dtype).to(self.device)

    def _outside(self) -> Iterator[tuple[nn.Module, str, str]]:
        """Yield (module, local name, full name) of each stored tensor outside the blocks."""
        for name in self.names:
            if not name.startswith(f"{self.prefix}."):
                parent, _, local = name.rpartition(".")
                yield self.model.get_submodule(parent), local, name

    @contextmanager
    def whole_outside(self) -> Iterator[None]:
        """Load all tensors outside the blocks, including the output head, for the body."""
        self._fill_outside(with_head=True)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head.weight.device.type == "meta":  # tied: stored once, under the embedding's name
            head.weight = embedding.weight
        yield
        self._empty_outside()
        drop_weights(head, recurse=False)

    def _fill_outside(self, with_head: bool = False) -> None:
        head = self.model.get_output_embeddings()
        for module, local, name in self._outside():
            if with_head or module is not head:
                module.load_state_dict({local: self._read(name)}, strict=False, assign=True)
        for buffer_name, buffer in list(self.model.named_buffers()):
            if buffer.device.type != "meta":
                parent, _, local = buffer_name.rpartition(".")
                setattr(self.model.get_submodule(parent), local, buffer.to(self.device))

    def _empty_outside(self) -> None:
        for module, _, _ in self._outside():
            drop_weights(module, recurse=False)
