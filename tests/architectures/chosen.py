"""Which architectures CI runs: the most used ones, and a tenth of the others that changes daily."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

QUICK = ("llama", "gemma2", "opt")
MOST_USED = (
    *QUICK,
    "qwen2",
    "qwen3",
    "mistral",
    "phi",
    "phi3",
    "gemma3_text",
    "gpt2",  # Conv1D
    "gpt_neox",  # a head of another name on disk
    "gptj",
    "gpt_neo",
    "gpt_bigcode",
    "bloom",
    "falcon",
    "mixtral",  # experts in a list on disk
    "qwen3_moe",
    "gpt_oss",  # transposed experts with biases
    "deepseek_v2",  # latent attention
    "deepseek_v3",
    "glm4_moe",
    "qwen3_5",  # linear attention within a multimodal model
    "mamba2",
    "jamba",
    "zamba2",  # layers that share weights
    "lfm2",
    "gemma3",
    "gemma4",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "mllama",  # cross-attention
)


def rotating_tenth(names: Iterable[str], day: date) -> list[str]:
    """Return every tenth of the names that are not among the most used, by the day."""
    others = sorted({*names} - {*MOST_USED})
    return others[day.toordinal() % 10 :: 10]
