"""Finds the text decoder of a model, its blocks, and the part that gives logits."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

from hisvd_cli.utils.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = (
    "Supported: decoders of transformers, also with experts or with images as further input."
)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the module list of the decoder blocks.

    It is the list of the text decoder with as many blocks as the config says and the most
    parameters, whatever its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    decoder = text_decoder(model)
    within = next((f"{name}." for name, m in model.named_modules() if m is decoder), "")
    within = within.removeprefix(".")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(within) and _are_blocks(module)
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks.", SUPPORTED
        )
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", 0)

    def rank(found: tuple[str, nn.ModuleList]) -> tuple[bool, int]:
        layers = found[1]
        return len(layers) == wanted, sum(p.numel() for p in layers.parameters())

    return max(lists, key=rank)


def _are_blocks(layers: nn.ModuleList) -> bool:
    """Return whether a list holds blocks, which consist of several layers."""
    return len(layers) > 0 and all(any(True for _ in layer.children()) for layer in layers)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the text decoder according to transformers; the model itself if it names none."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(found, nn.Module):
        return model
    has_blocks = any(isinstance(module, nn.ModuleList) for module in found.modules())
    return found if has_blocks else model


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the innermost module that runs the decoder blocks on tokens, or else what transformers
    calls the decoder."""
    try:
        name, _ = decoder_blocks(model)
    except UnsupportedModelError:
        return text_decoder(model)
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    return model


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the innermost part of a model that maps tokens to logits: the text model of some
    multimodal models, otherwise the model itself."""
    from transformers import PreTrainedModel

    decoder, found = decoder_of(model), model
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        inner = any(module is decoder for module in part.modules())
        if inner and part.get_output_embeddings() is not None:
            found = part
    return found
