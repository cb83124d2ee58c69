"""Walk the decoder blocks of a model one at a time: memory is one block and the hidden states.

The model is built on the meta device. A first pass with every block replaced by a stub records
what each block is called with (masks, positions, rotary embeddings), so that nothing of a model's
own forward pass is rebuilt here; then each block is filled from disk, run and freed in turn.

Legend: S sequences, L tokens each, d hidden width; hidden states ``[S, L, d]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hisvd_cli.errors import NumericalError, SourceError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.source import Source

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def build_meta_model(
    source: Source, dtype: torch.dtype = torch.float32, compressed: bool = False
) -> PreTrainedModel:
    """Build the model without weights (rotary buffers are real).

    Args:
        source: the model.
        dtype: of its parameters.
        compressed: accept a compressed checkpoint, and build the dense model that it stands for.

    Raises:
        UnsupportedModelError: no decoder-only language model, or one that is compressed already.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    method = source.quantization.get("quant_method")
    if method and not (compressed and method == "hisvd"):
        already = method == "hisvd"
        raise UnsupportedModelError(
            f"{source.name} is {'compressed' if already else f'quantized ({method})'} already.",
            "Give the original model; 'hisvd inspect' tells where a checkpoint came from."
            if already
            else "Give the model in full precision.",
        )
    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                source.config, dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except (ValueError, KeyError, ImportError) as error:
        kind = source.config.model_type
        raise UnsupportedModelError(
            f"{source.name} is of type '{kind}', which is no causal language model here.",
            "Give a decoder-only model, such as llama, mistral, qwen, opt, gemma or phi.",
        ) from error
    model.eval()
    return model


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder's blocks. Raises UnsupportedModelError."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no list of decoder blocks under get_decoder().layers.",
            "Supported: llama, mistral, qwen2, qwen3, opt, gemma and phi, and models built alike.",
        )
    name = next(name for name, module in model.named_modules() if module is layers)
    return name, layers


def tensor_names(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Return name in the model → name on disk, tied tensors once.

    A checkpoint that was saved from the headless model lacks the base model's prefix.

    Raises:
        SourceError: a tensor of the model is not on disk.
    """
    prefix = f"{model.base_model_prefix}."
    tied = _tied_names(model)
    names: dict[str, str] = {}
    for name in model.state_dict():
        stored = name if name in source.weights else name.removeprefix(prefix)
        if stored in source.weights:
            names[name] = stored
        elif name not in tied:
            raise SourceError(
                f"{source.name} lacks the tensor {name}, which its config asks for.",
                "The checkpoint is incomplete or of another architecture: fetch it again.",
            )
    return {name: stored for name, stored in names.items() if name not in tied}


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names that share another one's tensor: an output head tied to the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    if head is None or embedding is None or not getattr(config, "tie_word_embeddings", False):
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


class BlockWalk:
    """A model whose blocks pass through memory one at a time.

    Args:
        source: the model.
        device: where blocks are run and hidden states live.
        dtype: in which blocks are run.
        batch: sequences per forward pass.
    """

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype, batch: int
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.batch = batch
        self.model = build_meta_model(source, dtype)
        self.prefix, self.layers = decoder_blocks(self.model)
        self.names = tensor_names(self.model, source)
        self._shapes = {name: t.shape for name, t in self.model.state_dict().items()}
        self.hidden = torch.empty(0)
        self._arguments: dict[int, list[Arguments]] = {}

    @torch.no_grad()
    def embed(self, tokens: Tensor, compute_hidden: bool = True) -> None:
        """Embed ``tokens [S, L]`` into hidden states, and record what each block is called with.

        Args:
            tokens: token ids.
            compute_hidden: False only records, for a walk that goes on from stored hidden states.
        """
        self._fill_outside()
        parts = []
        sizes_seen: set[int] = set()
        for ids in tokens.split(self.batch):
            if compute_hidden or len(ids) not in sizes_seen:
                parts.append(self._record(ids.to(self.device)))
                sizes_seen.add(len(ids))
        if compute_hidden:
            self.hidden = torch.cat(parts)
        self._empty_outside()

    def load(self, index: int) -> nn.Module:
        """Fill block ``index`` from disk and return it.

        Raises:
            SourceError, NumericalError: a tensor cannot be read, is misshapen or not finite.
        """
        layer = self.layers[index]
        name = f"{self.prefix}.{index}."
        tensors = {
            local: self._read(name + local).to(self.device, self.dtype)
            for local in layer.state_dict()
        }
        layer.load_state_dict(tensors, strict=True, assign=True)
        return layer

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run the loaded block ``index`` over all hidden states, in place.

        Raises:
            NumericalError: the block's output is not finite.
        """
        layer = self.layers[index]
        for start in range(0, len(self.hidden), self.batch):
            part = self.hidden[start : start + self.batch]
            args, kwargs = self._arguments[len(part)][index]
            out = layer(part, *args, **kwargs)
            state = out[0] if isinstance(out, tuple) else out
            if not bool(state.isfinite().all()):
                raise NumericalError(
                    f"The output of block {index} is NaN or infinite.",
                    "Use --dtype bfloat16 or float32; float16 overflows on many models.",
                )
            part.copy_(state)

    def free(self, index: int) -> None:
        """Give back the memory of block ``index``."""
        _drop_weights(self.layers[index], recurse=True)

    def _read(self, name: str) -> Tensor:
        tensor = self.source.weights.read(self.names[name])
        expected = self._shapes[name]
        if tensor.shape != expected:
            raise SourceError(
                f"{name} is {list(tensor.shape)} on disk where the config asks for "
                f"{list(expected)}.",
                "Config and weights belong to different models: fetch both again.",
            )
        return tensor

    def _outside(self) -> Iterator[tuple[nn.Module, str, str]]:
        """Yield (module, local name, full name) of each stored tensor that is in no block."""
        for name in self.names:
            if not name.startswith(f"{self.prefix}."):
                parent, _, local = name.rpartition(".")
                yield self.model.get_submodule(parent), local, name

    def _fill_outside(self) -> None:
        head = self.model.get_output_embeddings()
        for module, local, name in self._outside():
            if module is not head:  # logits are not computed here
                tensor = self._read(name).to(self.device, self.dtype)
                module.load_state_dict({local: tensor}, strict=False, assign=True)
        for buffer_name, buffer in list(self.model.named_buffers()):
            if buffer.device.type != "meta":
                parent, _, local = buffer_name.rpartition(".")
                setattr(self.model.get_submodule(parent), local, buffer.to(self.device))

    def _empty_outside(self) -> None:
        for module, _, _ in self._outside():
            _drop_weights(module, recurse=False)

    def _record(self, ids: Tensor) -> Tensor:
        """Return the first block's input ``[B, L, d]`` and keep every block's other arguments."""
        # Blocks return a tensor in most of transformers and a tuple in older parts of it. With the
        # wrong one the next block gets something else than the state that was passed on.
        for as_tuple in (False, True):
            calls, states = self._run_stubs(ids, as_tuple)
            if len(calls) == len(self.layers) and all(s is states[0] for s in states):
                self._arguments[len(ids)] = calls
                return states[0]
        raise UnsupportedModelError(
            f"{type(self.model).__name__} does more between its blocks than pass on the hidden "
            "state.",
            "Supported: llama, mistral, qwen2, qwen3, opt, gemma and phi, and models built alike.",
        )

    def _run_stubs(self, ids: Tensor, as_tuple: bool) -> tuple[list[Arguments], list[Tensor]]:
        calls: list[Arguments] = []
        states: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            state = args[0] if args else kwargs.pop("hidden_states")
            states.append(state)
            calls.append((args[1:], kwargs))
            return (state,) if as_tuple else state

        for layer in self.layers:
            layer.forward = record
        try:
            self.model.get_decoder()(input_ids=ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return calls, states


def _drop_weights(module: nn.Module, recurse: bool) -> None:
    """Send parameters to the meta device; buffers, which no file may hold, stay."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
