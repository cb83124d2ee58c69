"""Reads and checks values of config.json: dtypes, quantization settings, experts per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.sources.quantized_input import CONFIG_KEYS
from hisvd_cli.utils.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPE_KEYS = ("dtype", "torch_dtype")
_EXPERT_KEYS = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)
"""Names of the number of experts per token, in the configs of different architectures."""


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


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Return how many experts of a stack one token passes; None if the config does not say, or says
    different numbers for its blocks."""
    text = config.get_text_config()
    for key in _EXPERT_KEYS:
        known = getattr(text, key, None)
        counts = set(known) if isinstance(known, list) else {known}
        if len(counts) == 1 and isinstance(count := counts.pop(), int) and count > 0:
            return count
    return None
