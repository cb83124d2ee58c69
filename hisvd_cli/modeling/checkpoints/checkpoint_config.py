"""``config.json`` of compressed checkpoints, and of the dense models made from them."""

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
    """Return ranks, storage and bits as a config.json names them, checked as the loader does.

    Args:
        config: its content.
        where: the folder or file that holds it.

    Raises:
        SourceError: it names none, or what cannot be.
    """
    from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig

    try:
        return HiSVDConfig(**config["quantization_config"])
    except (ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"config.json of {where} cannot be used: {reason(error)}",
            "Compress the model again, or use the version of hisvd that wrote it.",
        ) from error


def architecture_of(config: Mapping[str, Any], where: Path) -> str:
    """Return the class name of the model of a config.json. Raises SourceError."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise SourceError(f"config.json of {where} names no architecture.", "Compress again.")
    return str(named[0])


def compressed_config(
    config: Mapping[str, Any],
    architecture: str,
    ranks: Mapping[str, int],
    storage: Storage,
    **quantized: Any,
) -> dict[str, Any]:
    """Return config.json of the compressed model: the base model's, ranks, and how to load it.

    Args:
        config: of the base model.
        architecture: class name of the model.
        ranks: of the low-rank sublayers.
        storage: of those.
        quantized: ``bits`` and ``group_size``, where some are integers.
    """
    from hisvd_cli.modeling.layers.transformers_plugin import (
        AUTO_MAP,
        HiSVDConfig,
        format_version_of,
    )

    version = format_version_of(storage, quantized.get("bits"))
    quantization = HiSVDConfig(ranks, version, storage, **quantized)
    return {
        **config,
        "architectures": [architecture],
        "auto_map": dict(AUTO_MAP),
        "quantization_config": quantization.to_dict(),
    }


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without anything that hisvd added."""
    added = {"quantization_config", "auto_map"}
    return {key: value for key, value in config.items() if key not in added}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a model whose output head is stored beside the embedding."""
    text = config.get("text_config")
    inner = (
        {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    )
    return {**config, **inner, "tie_word_embeddings": False}


def write_loader(folder: Path) -> None:
    """Put the code beside the weights that ``trust_remote_code=True`` needs where hisvd is not
    installed."""
    from hisvd_cli.modeling.layers.transformers_plugin import remote_code_files

    for name, path in remote_code_files().items():
        shutil.copyfile(path, folder / name)
