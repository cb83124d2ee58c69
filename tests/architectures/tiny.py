"""Builds a tiny random model of any class of ``registry``, with the demo's tokenizer."""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import hisvd_cli
from tests.architectures.overrides import OVERRIDES
from tests.architectures.registry import Architecture, config_class
from tests.architectures.sizes import (
    HEADS,
    HIDDEN,
    LAYERS,
    RULES,
    TOWER,
    representatives,
    special_tokens,
    tiny_rope,
)

DEMO = Path(hisvd_cli.__file__).parent / "demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEXT_LAYERS = 3
TOWER_LAYERS = 2
LARGEST = 9_000_000
_KEPT = ("A_log", "a_log", "dt_bias", "time_decay", "time_first", "inv_freq", "lambda", "slopes")


def tiny_config(each: Architecture) -> PreTrainedConfig:
    """Return a tiny configuration. Raises what the class raises on a setting that it refuses."""
    own = copy.deepcopy(OVERRIDES.get(each.model_type, {}))
    return _shrunk(config_class(each.model_type), own, False)


def _shrunk(kind: type[PreTrainedConfig], own: dict[str, Any], tower: bool) -> PreTrainedConfig:
    """Return a configuration of a class with the rules applied to it and to all within it.

    Args:
        kind: the class.
        own: settings that go before the rules; ``{"text_config": {...}}`` for those within.
        tower: whether it belongs to a part that sees no text.
    """
    default = kind()
    known = {field.name for field in fields(kind)}
    renamed = kind.attribute_map
    values = {name: vars(default).get(renamed.get(name, name)) for name in sorted(known)}
    made: dict[str, Any] = {k: v for k, v in RULES.items() if _is_size(values.get(k))}
    made |= special_tokens(k for k in known if _is_size(values[k]))
    made |= dict.fromkeys(known & {"bos_token_id", "eos_token_id", "pad_token_id"}, 0)
    made |= _layers(values, tower)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            within = tower or TOWER.search(name) is not None
            made[name] = _shrunk(type(value), own.pop(name, {}), within)
    made |= _heads(values, made, tower)
    made |= own
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_parameters" not in own:
        made["rope_parameters"] = tiny_rope(
            rope, made, getattr(kind, "ignore_keys_at_rope_validation", ())
        )
    return kind(**made)


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _layers(values: dict[str, Any], tower: bool) -> dict[str, Any]:
    """Return the number of layers, and what lists say of each."""
    name = next((n for n in LAYERS if n in values), None)
    count = values[name] if name else None
    if name is None or not isinstance(count, int):
        return {}
    lists = {
        key: list(value)
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == count > 1
    }
    indices = {key: value for key, value in lists.items() if value == list(range(count))}
    others = {key: value for key, value in lists.items() if key not in indices}
    chosen = representatives(list(others.values()), TOWER_LAYERS if tower else TEXT_LAYERS)
    made: dict[str, Any] = {name: len(chosen)}
    made |= {key: [value[i] for i in chosen] for key, value in others.items()}
    return made | {key: list(range(len(chosen))) for key in indices}


def _heads(values: dict[str, Any], made: dict[str, Any], tower: bool) -> dict[str, Any]:
    """Return what widths of heads must agree with others."""
    heads: dict[str, Any] = {}
    latent = "kv_lora_rank" in values
    if "num_key_value_heads" in made and (tower or latent):
        heads["num_key_value_heads"] = HEADS
    if "head_dim" in made and tower:
        heads["head_dim"] = HIDDEN // HEADS
    if latent:
        rope = made.get("qk_rope_head_dim", 0)
        whole = made["qk_nope_head_dim"] + rope
        if "qk_head_dim" in values:
            heads["qk_head_dim"] = whole
        if "head_dim" in made:
            same = values["head_dim"] == values["qk_rope_head_dim"]
            heads["head_dim"] = rope if same else whole
    return heads


def build(each: Architecture, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model in float32 with random weights.

    Raises:
        ValueError: it has more than ``LARGEST`` parameters; or what its class raises.
    """
    config = tiny_config(each)
    kind = getattr(transformers, each.class_name)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"It has {size} parameters, above the limit of {LARGEST}.")
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config).float().eval()
    randomize(model, seed)
    return model


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw the weights anew, so that states keep their size and routers spread their tokens."""
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    scale = HIDDEN**-0.5 if tied else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.rpartition(".")[2].startswith(_KEPT):
                continue
            if "embed" in name and parameter.ndim == 2:
                parameter.copy_(noise * scale)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:  # norms, which some classes centre at 0 and some at 1
                parameter.add_(0.1 * noise)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # Youtu's class does so when it loads


def save(each: Architecture, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write a tiny model and the demo's tokenizer to a folder; return the model."""
    model = build(each, seed)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(DEMO / name, folder / name)
    return model
