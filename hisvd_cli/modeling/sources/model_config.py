"""Checks and cleans up dtypes and quantization settings in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hisvd_cli.modeling.sources.quantized_input import CONFIG_KEYS
from hisvd_cli.utils.errors import SourceError

_DTYPE_KEYS = ("dtype", "torch_dtype")


def check_dtype(name: str, config: Mapping[str, Any]) -> None:
    """Reject dtypes that torch does not have, such as ``auto``.

    Raises:
        SourceError: config.json names such a dtype.
    """
    import torch

    for key, said in _dtypes(config):
        known = getattr(torch, said, None) if isinstance(said, str) else None
        if not isinstance(known, torch.dtype):
            raise SourceError(
                f"config.json of {name} has the {key} {said!r}, which torch does not support.",
                'Set it to the dtype of the weights, such as "bfloat16".',
            )


def _dtypes(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    text = config.get("text_config")
    for document in (config, text if isinstance(text, dict) else {}):
        for key in _DTYPE_KEYS:
            said = document.get(key)
            for one in said.values() if isinstance(said, dict) else [said]:
                if one is not None:
                    yield key, one


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json for dequantized weights of ``dtype``, without quantization settings, also
    in the ``text_config`` of multimodal models."""
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    for key in _DTYPE_KEYS:
        if str(plain.get(key)).startswith("float8"):
            plain[key] = dtype
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = plain_config(text, dtype)
    return plain
