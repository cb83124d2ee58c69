"""``config.json`` of compressed checkpoints and of dense models made from them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.layers.lowrank import Storage
from hisvd_cli.utils.errors import SourceError, reason

if TYPE_CHECKING:
    from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig

FORMAT_VERSION = 1
QUANT_METHOD = "hisvd"


def quantization_of(config: Mapping[str, Any], where: Path) -> HiSVDConfig:
    """Return the checked quantization config (ranks, storage, bits) of a config.json.

    Args:
        config: content of config.json.
        where: the folder or file that contains it.

    Raises:
        SourceError: the quantization config is missing or invalid.
    """
    from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig

    try:
        return HiSVDConfig(**config["quantization_config"])
    except (ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"config.json of {where} is invalid: {reason(error)}",
            "Compress the model again, or use the version of hisvd that wrote it.",
        ) from error


def architecture_of(config: Mapping[str, Any], where: Path) -> str:
    """Return the class name of the model of a config.json. Raises SourceError."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise SourceError(
            f"config.json of {where} has no architecture.", "Compress the model again."
        )
    return str(named[0])


def compressed_config(
    config: Mapping[str, Any],
    architecture: str,
    ranks: Mapping[str, int],
    storage: Storage,
    **quantized: Any,
) -> dict[str, Any]:
    """Return the config.json of a compressed model: that of the base model, with the quantization
    config and the loader added.

    Args:
        config: config.json of the base model.
        architecture: class name of the model.
        ranks: name → rank of the low-rank sublayers.
        storage: storage of their factors.
        quantized: ``bits`` and ``group_size``, if sublayers are quantized; ``experts``, the layout
            of stacks of experts, if there are any.
    """
    from hisvd_cli.modeling.layers.transformers_plugin import (
        HiSVDConfig,
        auto_map,
        format_version_of,
    )

    version = format_version_of(storage, quantized.get("bits"), quantized.get("experts"))
    quantization = HiSVDConfig(ranks, version, storage, **quantized)
    return {
        **config,
        "architectures": [architecture],
        "auto_map": auto_map(auto_class_of(architecture)),
        "quantization_config": quantization.to_dict(),
    }


def auto_class_of(architecture: str) -> str:
    """Return the name of the class of transformers that loads an architecture: that of causal
    language models, unless it is only known as a multimodal model."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    multimodal = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    if architecture in multimodal and architecture not in causal:
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without the keys that hisvd added."""
    added = {"quantization_config", "auto_map"}
    return {key: value for key, value in config.items() if key not in added}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for a model with an untied output head."""
    text = config.get("text_config")
    inner = (
        {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    )
    return {**config, **inner, "tie_word_embeddings": False}


def write_loader(folder: Path) -> None:
    """Copy the loader code into a folder, for ``trust_remote_code=True`` without hisvd."""
    from hisvd_cli.modeling.layers.transformers_plugin import remote_code_files

    for name, path in remote_code_files().items():
        shutil.copyfile(path, folder / name)
