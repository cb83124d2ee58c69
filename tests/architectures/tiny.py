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
    GROUPS,
    HEAD,
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
LARGEST = 4_000_000
_KEPT = ("A_log", "a_log", "dt_bias", "time_decay", "time_first", "inv_freq", "lambda", "slopes")


def tiny_config(each: Architecture) -> PreTrainedConfig:
    """Return a tiny configuration. Raises what the class raises on a setting that it refuses."""
    own = copy.deepcopy(OVERRIDES.get(each.model_type, {}))
    return _shrunk(config_class(each.model_type), {}, own, False)


def _shrunk(
    kind: type[PreTrainedConfig], start: dict[str, Any], own: dict[str, Any], tower: bool
) -> PreTrainedConfig:
    """Return a configuration of a class with the rules applied to it and to all within it.

    Args:
        kind: the class.
        start: what the default starts with, as the enclosing class wants it.
        own: settings that go before the rules; ``{"text_config": {...}}`` for those within.
        tower: whether it belongs to a part that sees no text.
    """
    default = kind(**{**start, **own.pop("start", {})})
    values = vars(default)
    known = {field.name for field in fields(kind)}
    made = dict(start)
    made |= {k: v for k, v in RULES.items() if k in known and _is_size(values.get(k))}
    made |= special_tokens(k for k in known if isinstance(values.get(k), int))
    made |= dict.fromkeys(known & {"bos_token_id", "eos_token_id", "pad_token_id"}, 0)
    made |= _layers(default, known, tower)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            within = tower or TOWER.search(name) is not None
            inner = _shrunk(type(value), {}, own.pop(name, {}), within)
            made[name] = inner
    if tower:
        made.pop("num_key_value_heads", None)
        made |= {"num_key_value_heads": HEADS} if "num_key_value_heads" in known else {}
        made |= {"head_dim": HIDDEN // HEADS} if "head_dim" in made else {}
    if "qk_head_dim" in known:
        made["qk_head_dim"] = RULES["qk_nope_head_dim"] + RULES["qk_rope_head_dim"]
    made |= own
    made |= _rope({**values, **made}, own)
    return kind(**made)


def _is_size(value: object) -> bool:
    return type(value) is int


def _layers(default: PreTrainedConfig, known: set[str], tower: bool) -> dict[str, Any]:
    """Return the number of layers, and what lists say of each."""
    name = next((n for n in LAYERS if n in known), None)
    count = getattr(default, name, None) if name else None
    if name is None or not isinstance(count, int):
        return {}
    lists = {
        key: value
        for key, value in vars(default).items()
        if key in known and isinstance(value, (list, tuple)) and len(value) == count and count > 1
    }
    least = TOWER_LAYERS if tower else TEXT_LAYERS
    chosen = representatives(list(lists.values()), least)
    made: dict[str, Any] = {name: len(chosen)}
    return made | {key: [value[i] for i in chosen] for key, value in lists.items()}


def _rope(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_parameters" in own:
        return {}
    head = values.get("head_dim") or values.get("hidden_size", HIDDEN) // HEADS
    if "qk_rope_head_dim" in values:
        head = values["qk_rope_head_dim"]
    return {"rope_parameters": tiny_rope(rope, head)}


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


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw the weights anew, so that states keep their size and routers spread their tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.rpartition(".")[2].startswith(_KEPT):
                continue
            if "embed" in name and parameter.ndim == 2:
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:  # norms, which some classes centre at 0 and some at 1
                parameter.add_(0.1 * noise)


def save(each: Architecture, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write a tiny model and the demo's tokenizer to a folder; return the model."""
    model = build(each, seed)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(DEMO / name, folder / name)
    return model
