"""Walk the decoder blocks of a model one at a time: memory is one block and the hidden states.

The model is built on the meta device. A first pass with every block replaced by a stub records
what each block is called with (masks, positions, rotary embeddings), so that nothing of a model's
own forward pass is rebuilt here; then each block is filled from disk, run and freed in turn.

Legend: S sequences, L tokens each, d hidden width; hidden states ``[S, L, d]``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hisvd_cli.errors import NumericalError, SourceError, UnsupportedModelError
from hisvd_cli.tensorfile import reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.source import Source

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_SUPPORTED = "Supported: llama, mistral, qwen2, qwen3, opt, gemma and phi, and models built alike."


class _DivertedError(Exception):
    """A block was given something else than the state that the one before it returned."""


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

    _check_precision(source, compressed)
    if getattr(source.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source.name} ('{source.config.model_type}') has an encoder beside its decoder.",
            _SUPPORTED,
        )
    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(source.config),  # the model writes its dtype into the config
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
            )
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{source.name} ('{source.config.model_type}') cannot be built as a causal language "
            f"model: {reason(error)}",
            _SUPPORTED,
        ) from error
    model.eval()
    return model


def _check_precision(source: Source, compressed: bool) -> None:
    method = source.quantization.get("quant_method")
    if method == "hisvd" and not compressed:
        raise UnsupportedModelError(
            f"{source.name} is compressed already.",
            "Give the original model; 'hisvd inspect' tells where a checkpoint came from.",
        )
    if method and method != "hisvd":
        raise UnsupportedModelError(
            f"{source.name} is quantized ({method}) already.", "Give the model in full precision."
        )


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder's blocks. Raises UnsupportedModelError."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no list of decoder blocks under get_decoder().layers.",
            _SUPPORTED,
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
    names: dict[str, str] = {}
    missing: dict[str, None] = {}
    for name in model.state_dict():
        stored = name if name in source.weights else name.removeprefix(prefix)
        if stored in source.weights:
            names[name] = stored
        else:
            missing[name] = None
    _untie(model, source, names, missing)
    for name in missing:
        raise SourceError(
            f"{source.name} lacks the tensor {name}, which its config asks for.",
            "The checkpoint is incomplete or of another architecture: fetch it again.",
        )
    return names


def _untie(
    model: PreTrainedModel, source: Source, names: dict[str, str], missing: dict[str, None]
) -> None:
    """Name the tensor of a tied head once, by the embedding, whichever of them is on disk.

    As in transformers, a head on disk that differs from the embedding is no copy, and stays.
    """
    head, embedding = _tied_names(model) or ("", "")
    if head in missing:
        del missing[head]
    elif embedding in missing:
        del missing[embedding]
        names[embedding] = names.pop(head)
    elif head in names and torch.equal(
        source.weights.read(names[head]), source.weights.read(names[embedding])
    ):
        del names[head]


def _tied_names(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the names of an output head and of the embedding that it shares its matrix with."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    if head is None or embedding is None or not getattr(config, "tie_word_embeddings", False):
        return None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return names[head], names[embedding]


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
        self._record(tokens[:1].to(self.device))  # what ``probe`` runs on
        for start in range(0, len(tokens), self.batch):
            ids = tokens[start : start + self.batch]
            if compute_hidden or len(ids) not in self._arguments:
                state = self._record(ids.to(self.device))
                if compute_hidden:
                    self._keep(start, state, len(tokens))
        self._empty_outside()

    def _keep(self, start: int, state: Tensor, count: int) -> None:
        if start == 0:  # all of the memory at once: joining parts would need it twice
            self.hidden = state.new_empty(count, *state.shape[1:])
        self.hidden[start : start + len(state)] = state

    def load(self, index: int) -> nn.Module:
        """Fill block ``index`` from disk and return it.

        Raises:
            SourceError, NumericalError: a tensor cannot be read, is misshapen or not finite.
        """
        layer = self.layers[index]
        name = f"{self.prefix}.{index}."
        tensors = {local: self._read(name + local) for local in layer.state_dict()}
        layer.load_state_dict(tensors, strict=True, assign=True)
        return layer

    def probe(self, index: int) -> None:
        """Run the loaded block ``index`` over the first sequence for what watches it; the hidden
        states stay as they are."""
        self._run(index, self.hidden[:1])

    def advance(self, index: int) -> None:
        """Run the loaded block ``index`` over all hidden states, in place.

        Raises:
            NumericalError: the block's output is not finite.
        """
        for start in range(0, len(self.hidden), self.batch):
            part = self.hidden[start : start + self.batch]
            part.copy_(self._run(index, part))

    @torch.no_grad()
    def _run(self, index: int, part: Tensor) -> Tensor:
        args, kwargs = self._arguments[len(part)][index]
        out = self.layers[index](part, *args, **kwargs)
        state: Tensor = out[0] if isinstance(out, tuple) else out
        if not bool(state.isfinite().all()):
            raise NumericalError(
                f"The output of block {index} is NaN or infinite.", overflow_hint(self.dtype)
            )
        return state

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
        # Counters and masks stay what they are; only numbers are rounded.
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype)

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
                module.load_state_dict({local: self._read(name)}, strict=False, assign=True)
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
            try:
                state, calls = self._run_stubs(ids, as_tuple)
            except _DivertedError:
                continue
            if not _same(calls, self._arguments.setdefault(len(ids), calls), set()):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} gives its blocks more than the hidden state of "
                    "the text, such as embeddings per block.",
                    _SUPPORTED,
                )
            return state
        raise UnsupportedModelError(
            f"{type(self.model).__name__} does more between its blocks than pass on the hidden "
            "state.",
            _SUPPORTED,
        )

    def _run_stubs(self, ids: Tensor, as_tuple: bool) -> tuple[Tensor, list[Arguments]]:
        calls: list[Arguments] = []
        states: list[Tensor] = []

        def stub(index: int, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            state = args[0] if args else kwargs.pop("hidden_states", None)
            known = states[0] if states else state
            if not isinstance(state, Tensor) or state is not known or index != len(calls):
                raise _DivertedError
            states.append(state)
            calls.append((args[1:], kwargs))
            return (state,) if as_tuple else state

        for index, layer in enumerate(self.layers):
            layer.forward = partial(stub, index)
        try:
            self.model.get_decoder()(input_ids=ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        if len(calls) != len(self.layers):
            raise _DivertedError
        return states[0], calls


def overflow_hint(dtype: torch.dtype) -> str:
    """Say what to do about activations that are not finite."""
    if dtype == torch.float16:
        return "Use --dtype bfloat16 or float32; float16 overflows on many models."
    return "The model itself overflows: try it with 'hisvd eval', or use another checkpoint."


def _same(one: Any, other: Any, seen: set[tuple[int, int]]) -> bool:
    """Tell whether two calls' arguments are equal; masks that blocks share are compared once."""
    if one is other or (id(one), id(other)) in seen:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, list | tuple):
        same = len(one) == len(other) and all(map(partial(_same, seen=seen), one, other))
    elif isinstance(one, dict):
        same = one.keys() == other.keys() and all(_same(one[k], other[k], seen) for k in one)
    else:
        same = bool(one == other)
    if same:
        seen.add((id(one), id(other)))
    return same


def _drop_weights(module: nn.Module, recurse: bool) -> None:
    """Send parameters to the meta device; buffers, which no file may hold, stay."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
