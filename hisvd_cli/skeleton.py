"""The structure of a model without its weights: built on the meta device, read from its folder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from hisvd_cli.errors import SourceError, UnsupportedModelError
from hisvd_cli.tensorfile import reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.source import Source

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
    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(source.config),  # the model writes its dtype into the config
                dtype=dtype,
                trust_remote_code=source.runs_code,
            )
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{source.name} ('{source.config.model_type}') cannot be built as a causal language "
            f"model: {reason(error)}",
            SUPPORTED,
        ) from error
    model.eval()
    return model


def build_stored_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model without weights as it lies on disk: with low-rank layers where it is
    compressed.

    Raises:
        UnsupportedModelError: see :func:`build_meta_model`.
        SourceError: the ranks in its config do not fit the model.
    """
    model = build_meta_model(source, dtype, compressed=True)
    if source.quantization.get("quant_method") == "hisvd":
        from hisvd_cli.transformers_plugin import HiSVDConfig, replace_linears

        try:
            replace_linears(model, HiSVDConfig(**source.quantization))
        except ValueError as error:
            raise SourceError(
                f"{source.name} cannot be built: {reason(error)}",
                f"Look closer with: hisvd inspect {source.name}",
            ) from error
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
