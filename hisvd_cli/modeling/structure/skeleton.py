"""Builds models without weights on the meta device."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hisvd_cli.modeling.sources.quantized_input import OWN, check_config
from hisvd_cli.modeling.sources.source import read_config
from hisvd_cli.modeling.structure.decoders import SUPPORTED, decoder_blocks
from hisvd_cli.modeling.structure.linearize import linearize
from hisvd_cli.modeling.structure.tied import shared_tensors
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError, reason
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source


def build_meta_model(
    source: Source,
    dtype: torch.dtype = torch.float32,
    compressed: bool = False,
    working: bool = True,
) -> PreTrainedModel:
    """Build the dense model without weights; rotary buffers are initialized.

    Args:
        source: the model.
        dtype: dtype of the parameters.
        compressed: accept a compressed checkpoint, and build the equivalent dense model.
        working: replace other forms of linear layers by ``nn.Linear``, see
            :func:`hisvd_cli.modeling.structure.linearize.linearize`.

    Raises:
        UnsupportedModelError: not a decoder-only language model, or already compressed.
    """
    from accelerate import init_empty_weights

    _check_precision(source, compressed)
    _refuse_encoders(source)
    with library_errors(partial(_not_built, source)), init_empty_weights():
        model: PreTrainedModel = auto_class(source.config).from_config(
            copy.deepcopy(source.config),  # from_config writes the dtype into the config
            dtype=dtype,
            trust_remote_code=source.runs_code,
        )
    model.eval()
    if working:
        prepare(model)
    return model


def _refuse_encoders(source: Source) -> None:
    """Raise UnsupportedModelError for models that do not predict the next token from earlier ones.

    A model type that transformers also lists for masked language modelling is a decoder only with
    ``is_decoder`` in its config: without it, each token attends to later ones.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    config, kind = source.config, ""
    if getattr(config, "is_encoder_decoder", False):
        kind = "encoder-decoder"
    elif config.model_type in MASKED and not getattr(config, "is_decoder", False):
        kind = "encoder"
    if kind:
        raise UnsupportedModelError(
            f"{source.name} ('{config.model_type}') is an {kind} model, which is out of scope: "
            "hisvd compresses decoders.",
            SUPPORTED,
        )


def prepare(model: PreTrainedModel) -> None:
    """Replace other forms of linear layers in the decoder blocks by ``nn.Linear``, in place.

    A model without decoder blocks is left as it is.
    """
    with suppress(UnsupportedModelError):
        linearize(decoder_blocks(model)[1])
        for name in {n for pair in shared_tensors(model).items() for n in pair}:
            vars(model.get_submodule(name.rpartition(".")[0]))["shared"] = True
        for config in (model.config, model.config.get_text_config()):
            config._experts_implementation = "eager"  # the others bypass linear layers


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a model of this config.

    A multimodal model is loaded whole if its config names that architecture.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
    )

    named = set(config.architectures or ())
    causal, multimodal = CAUSAL.get(config.model_type), MULTIMODAL.get(config.model_type)
    if multimodal and (causal is None or (multimodal in named and causal not in named)):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _not_built(source: Source, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source.name} ('{source.config.model_type}') cannot be built as a causal language "
        f"model: {why}",
        SUPPORTED,
    )


def build_stored_model(source: Source, dtype: torch.dtype, working: bool = True) -> PreTrainedModel:
    """Build a model without weights as stored on disk: with low-rank layers if it is compressed.

    Args:
        source: the model.
        dtype: dtype of the parameters.
        working: as for :func:`build_meta_model`.

    Raises:
        UnsupportedModelError: see :func:`build_meta_model`.
        SourceError: the ranks in its config do not match the model.
    """
    model = build_meta_model(source, dtype, compressed=True, working=False)
    if source.quantization.get("quant_method") == "hisvd":
        from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig, replace_linears

        try:
            replace_linears(model, HiSVDConfig(**source.quantization))
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"{source.name} cannot be built: {reason(error)}",
                f"Run: hisvd inspect {source.name}",
            ) from error
    if working:
        prepare(model)
    return model


def _check_precision(source: Source, compressed: bool) -> None:
    if source.quantization.get("quant_method") == OWN and not compressed:
        raise UnsupportedModelError(
            f"{source.name} is already compressed.",
            "Use the original model; 'hisvd inspect' shows the base model of a checkpoint.",
        )
    check_config(source.name, source.folder, read_config(source.folder))
