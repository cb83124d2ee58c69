"""The structure of a model without its weights: built on the meta device, read from its folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hisvd_cli.modeling.sources.quantized_input import OWN, check_config
from hisvd_cli.modeling.sources.source import read_config
from hisvd_cli.modeling.sources.stored_names import (
    find_names,
    naming_notes,
    refuse_unmerged,
    value_head,
)
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError, reason
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source
    from hisvd_cli.utils.progress import Reporter

SUPPORTED = "Supported: llama, mistral, qwen2, qwen3, opt, gemma and phi, and models built alike."


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
            SUPPORTED,
        )
    with library_errors(partial(_not_built, source)), init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(source.config),  # the model writes its dtype into the config
            dtype=dtype,
            trust_remote_code=source.runs_code,
        )
    model.eval()
    return model


def _not_built(source: Source, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.name} ('{source.config.model_type}') cannot be built as a causal language "
        f"model: {why}",
        SUPPORTED,
    )


def build_stored_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model without weights as it lies on disk: with low-rank layers where it is
    compressed.

    Raises:
        UnsupportedModelError: see :func:`build_meta_model`.
        SourceError: the ranks in its config do not fit the model.
    """
    model = build_meta_model(source, dtype, compressed=True)
    if source.quantization.get("quant_method") == "hisvd":
        from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig, replace_linears

        try:
            replace_linears(model, HiSVDConfig(**source.quantization))
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"{source.name} cannot be built: {reason(error)}",
                f"Look closer with: hisvd inspect {source.name}",
            ) from error
    return model


def _check_precision(source: Source, compressed: bool) -> None:
    if source.quantization.get("quant_method") == OWN and not compressed:
        raise UnsupportedModelError(
            f"{source.name} is compressed already.",
            "Give the original model; 'hisvd inspect' tells where a checkpoint came from.",
        )
    check_config(source.name, source.folder, read_config(source.folder))


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder's blocks. Raises UnsupportedModelError."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no list of decoder blocks under get_decoder().layers.",
            SUPPORTED,
        )
    name = next(name for name, module in model.named_modules() if module is layers)
    return name, layers


def tensor_names(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Return name in the model → name on disk, tied tensors once.

    A checkpoint that was saved from the headless model lacks the base model's prefix.

    Raises:
        SourceError: a tensor of the model is not on disk.
    """
    wanted = list(model.state_dict())
    names = find_names(wanted, source.weights, model.base_model_prefix)
    missing = dict.fromkeys(name for name in wanted if name not in names)
    _untie(model, source, names, missing)
    for name in missing:
        refuse_unmerged(source.name, source.weights)
        if found := value_head(source.weights):
            raise UnsupportedModelError(
                f"{source.name} has a value or classification head ({found}) and lacks {name}, so "
                "it is not a language model.",
                "Give the language model that it was trained from.",
            )
        raise SourceError(
            f"{source.name} lacks the tensor {name}, which its config asks for.",
            "The checkpoint is incomplete or of another architecture: fetch it again.",
        )
    return names


def own_head(model: PreTrainedModel, names: Mapping[str, str]) -> bool:
    """Tell whether the output head lies on disk although the config ties it to the embedding.

    transformers 4 ties it all the same, and drops what is on disk.
    """
    return (_tied_names(model) or ("", ""))[0] in names


def tell_notes(source: Source, reporter: Reporter) -> None:
    """Warn of what is dequantized, merged, renamed or ignored where a model is read.

    Raises:
        SourceError, UnsupportedModelError: its weights cannot be read.
    """
    for note in source.notes:
        reporter.warn(note)
    if source.quantization.get("quant_method") == OWN:
        return
    with suppress(SourceError, UnsupportedModelError):  # the command itself says what is wrong
        model = build_meta_model(source)
        prefix, layers = decoder_blocks(model)
        names, base = tensor_names(model, source), model.base_model_prefix
        for note in naming_notes(names, source.weights, base, prefix, len(layers)):
            reporter.warn(note)


def read_tensor(
    source: Source, stored: str, name: str, expected: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Read one tensor of a model, its numbers in ``dtype``.

    Args:
        source: the model.
        stored: name on disk.
        name: in the model.
        expected: its shape there.
        dtype: of numbers; counters and masks stay what they are.

    Raises:
        SourceError, NumericalError: it cannot be read, is misshapen or not finite.
    """
    tensor = source.weights.read(stored)
    check_shape(name, tensor.shape, expected)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise SourceError where a tensor on disk has not the shape that the config asks for."""
    if tuple(found) != tuple(expected):
        raise SourceError(
            f"{name} is {list(found)} on disk where the config asks for {list(expected)}.",
            "Config and weights belong to different models: fetch both again.",
        )


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


def drop_weights(module: nn.Module, recurse: bool) -> None:
    """Send parameters to the meta device; buffers, which no file may hold, stay."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
