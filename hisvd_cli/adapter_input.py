"""A LoRA adapter beside the weights, or in a folder of its own: merged into what is read.

PEFT's definition: ``W + s · B A`` with ``s = alpha / r``, or ``alpha / √r`` with rank-stabilised
scaling; a pattern may give single layers another alpha, and the rank is that of A. Anything else an
adapter can hold is refused, because leaving it out would give another model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.errors import SourceError, UnsupportedModelError
from hisvd_cli.weights import Weights, open_file

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_DEFAULT = re.compile(r"\.(lora_[AB])\.(?:default\.)?weight$")
_HINT = (
    "Merge it with PEFT (merge_and_unload, then save_pretrained), or remove its files to work on "
    "the model without it."
)
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the weights beneath the adapter."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        folder: where it lies.
        config: its adapter_config.json.
    """

    folder: Path
    config: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The model that it was trained for. Raises SourceError where it names none."""
        named = self.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise SourceError(
                f"{self.folder / CONFIG} names no base model, and no weights lie beside it.",
                "Put the adapter into the folder of its base model.",
            )
        return named

    @property
    def files(self) -> list[Path]:
        """Its config and its weights. Raises SourceError where the weights are missing."""
        for name in FILES:
            if (self.folder / name).is_file():
                return [self.folder / CONFIG, self.folder / name]
        raise SourceError(
            f"{self.folder} holds {CONFIG} but no {FILES[0]}.",
            f"Bring the adapter's weights, or remove {CONFIG} if they are merged already.",
        )


def open_adapter(folder: Path) -> Adapter | None:
    """Return the adapter in a folder; None where there is none. Raises SourceError."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not a valid JSON file.", "Fetch the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object.", "Fetch the adapter again.")
    return Adapter(folder, config)


def check_adapter(adapter: Adapter) -> None:
    """Refuse an adapter that is more than low-rank additions to weights.

    Raises:
        UnsupportedModelError: it is.
    """
    config = adapter.config
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise _refusal(adapter, f"is of the type {kind!s:.40}")
    for key in ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices"):
        if config.get(key):
            raise _refusal(adapter, f"uses {key}")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise _refusal(adapter, "trains biases")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise _refusal(adapter, f"starts from changed weights (init_lora_weights '{start:.40}')")


def _refusal(adapter: Adapter, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The adapter in {adapter.folder} {why}, which cannot be merged here.", _HINT
    )


def on_compressed(name: str) -> tuple[str, str]:
    """Return what to say of an adapter on a checkpoint that hisvd compressed."""
    return (
        f"{name} is a compressed checkpoint with a LoRA adapter, which cannot be merged here.",
        _HINT,
    )


@dataclass(frozen=True)
class _Pair:
    """What is added to a weight: names of A ``[r, n]`` and B ``[m, r]``, and their factor."""

    a: str
    b: str
    scale: float


def merged(adapter: Adapter, weights: Weights) -> tuple[Weights, list[str]]:
    """Return weights with an adapter merged in, each as it is read, and a note that says so.

    Raises:
        UnsupportedModelError: the adapter is more than low-rank additions.
        SourceError: it does not fit the weights, or cannot be read.
    """
    check_adapter(adapter)
    held = open_file(adapter.files[1])
    pairs = _pairs(adapter, held)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    recipes = dict(weights.recipes)
    for module, pair in pairs.items():
        name = _stored_name(adapter, module, weights)
        _check_shapes(adapter, pair, held, weights.infos[name].shape, transposed)
        recipes[name] = partial(_add, weights, name, held, pair, transposed)
    note = f"The adapter in {adapter.folder} is merged into {len(pairs)} weights."
    view = replace(weights, recipes=recipes, parts=(*weights.parts, *adapter.files))
    return view, [note]


def _pairs(adapter: Adapter, held: Weights) -> dict[str, _Pair]:
    """Return module → its pair. Raises UnsupportedModelError, SourceError."""
    found: dict[str, dict[str, str]] = {}
    for name in held:
        if not (match := _DEFAULT.search(name)):
            raise _refusal(adapter, f"holds {name}")
        module = name[: match.start()].removeprefix(_PREFIX)
        found.setdefault(module, {})[match[1]] = name
    pairs = {}
    for module, halves in found.items():
        if halves.keys() != {"lora_A", "lora_B"}:
            raise SourceError(
                f"The adapter in {adapter.folder} lacks a half of {module}.",
                "It is incomplete: fetch it again.",
            )
        rank = held.infos[halves["lora_A"]].shape[0]
        pairs[module] = _Pair(halves["lora_A"], halves["lora_B"], _scale(adapter, module, rank))
    if not pairs:
        raise SourceError(f"{adapter.files[1]} holds no tensors.", "Fetch the adapter again.")
    return pairs


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """Return what a module's product is multiplied by. Raises SourceError."""
    alpha = adapter.config.get("lora_alpha", 8)
    patterns = adapter.config.get("alpha_pattern") or {}
    try:
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", module):
                alpha = value
                break
        stabilised = adapter.config.get("use_rslora")
        scale = float(alpha) / (math.sqrt(rank) if stabilised else rank)
    except (AttributeError, TypeError, ValueError, re.error, ZeroDivisionError) as error:
        raise SourceError(
            f"{adapter.folder / CONFIG} holds no usable lora_alpha for {module}.",
            "Fetch the adapter again.",
        ) from error
    if not math.isfinite(scale):
        raise SourceError(
            f"{adapter.folder / CONFIG} gives {module} the alpha {alpha}.",
            "Fetch the adapter again.",
        )
    return scale


def _stored_name(adapter: Adapter, module: str, weights: Weights) -> str:
    """Return the name on disk of a module's weight, which may have another prefix there."""
    wanted = f"{module}.weight"
    if wanted in weights:
        return wanted
    near = [n for n in weights if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
    if len(near) != 1:
        raise SourceError(
            f"The adapter in {adapter.folder} changes {module}, which the model does not have.",
            "It belongs to another model: name its base model with base_model_name_or_path.",
        )
    return near[0]


def _check_shapes(
    adapter: Adapter, pair: _Pair, held: Weights, shape: tuple[int, ...], transposed: bool
) -> None:
    a, b = held.infos[pair.a].shape, held.infos[pair.b].shape
    given = (b[0], a[1]) if len(a) == len(b) == 2 and b[1] == a[0] else ()
    if (given[::-1] if transposed else given) != shape:
        raise SourceError(
            f"The adapter in {adapter.folder} has {pair.a} {list(a)} and B {list(b)} for a weight "
            f"{list(shape)}.",
            "It belongs to another model.",
        )


def _add(weights: Weights, name: str, held: Weights, pair: _Pair, transposed: bool) -> Tensor:
    """Return a weight with its pair added in float32, rounded once."""
    import torch

    weight = weights.read(name)
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = held.read(pair.b).to(wide) @ held.read(pair.a).to(wide)
    product = product.T if transposed else product
    return weight.to(wide).add_(product, alpha=pair.scale).to(weight.dtype)
