"""What config.json says that holds for a model on disk, and not for its plain weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hisvd_cli.modeling.sources.quantized_input import CONFIG_KEYS
from hisvd_cli.utils.errors import SourceError

_DTYPE_KEYS = ("dtype", "torch_dtype")


def check_dtype(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a dtype that transformers would look up in torch and not find, such as ``auto``.

    Raises:
        SourceError: config.json names one.
    """
    import torch

    for key, said in _dtypes(config):
        known = getattr(torch, said, None) if isinstance(said, str) else None
        if not isinstance(known, torch.dtype):
            raise SourceError(
                f"config.json of {name} names the {key} {said!r}, which torch does not have.",
                'Name the dtype of the weights there, such as "bfloat16".',
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
    """Return config.json of the model with plain weights of ``dtype``: without what it says of a
    quantization, also in its part for the text of several modalities."""
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    for key in _DTYPE_KEYS:
        if str(plain.get(key)).startswith("float8"):
            plain[key] = dtype
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = plain_config(text, dtype)
    return plain
