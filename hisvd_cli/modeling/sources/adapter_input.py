"""Merges LoRA adapters into the weights while they are read.

The adapter is beside the weights or in a separate folder. As in PEFT, the merged weight is
``W + s · B A`` with ``s = alpha / r``, or ``alpha / √r`` with rank-stabilized scaling; patterns may
override alpha for some layers, and r is the rank of A. Whole tensors of the adapter (biases,
``modules_to_save``) replace those of the model. Anything else is rejected, because ignoring it
would change the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.sources.weights import Weights, open_file
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from hisvd_cli.utils.files.json_files import read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_HALF = re.compile(r"\.(lora_[AB])\.(?:default\.)?weight$")
_LARGEST_SCALE = 1e30
_LONGEST_PATTERN, _MOST_REPEATS = 500, 4
_PATTERN = r"(.*\.)?({})$"
"""What PEFT makes of a pattern, for the whole name of a module."""
_OTHER = re.compile(r"\.lora_|\.token_adapter\.")
_HINT = (
    "Merge it with PEFT (merge_and_unload, then save_pretrained), or remove its files to use the "
    "model without it."
)
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base weights."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        folder: its folder.
        config: content of adapter_config.json.
    """

    folder: Path
    config: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The base model. Raises SourceError if none is named."""
        named = self.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise SourceError(
                f"{self.folder / CONFIG} names no base model, and its folder has no weights.",
                "Copy the adapter into the folder of its base model.",
            )
        return named

    @property
    def files(self) -> list[Path]:
        """The config and the weight file. Raises SourceError if the weights are missing."""
        for name in FILES:
            if (self.folder / name).is_file():
                return [self.folder / CONFIG, self.folder / name]
        raise SourceError(
            f"{self.folder} has {CONFIG} but no {FILES[0]}.",
            f"Add the adapter's weights, or remove {CONFIG} if they are already merged.",
        )


def open_adapter(folder: Path) -> Adapter | None:
    """Return the adapter in a folder; None if there is none. Raises SourceError."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = read_json(path, strict=False)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} is not a valid JSON file.", "Download the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} is not a JSON object.", "Download the adapter again.")
    return Adapter(folder, config)


def check_adapter(adapter: Adapter) -> None:
    """Reject adapters that are more than low-rank updates of weights, or that PEFT rejects.

    Raises:
        UnsupportedModelError: the adapter is not supported.
        SourceError: a rank or a pattern is invalid.
    """
    config = adapter.config
    _patterns(adapter, "alpha_pattern")
    for name, rank in {"r": config.get("r", 8), **_patterns(adapter, "rank_pattern")}.items():
        if type(rank) is not int or rank < 1:
            raise _invalid(adapter, f"rank {rank!r:.40} ({name:.40})")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise _refusal(adapter, f"has the type {kind!s:.40}")
    for key in ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices"):
        if config.get(key):
            raise _refusal(adapter, f"uses {key}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise _refusal(adapter, f"changes the base weights (init_lora_weights '{start:.40}')")


def _patterns(adapter: Adapter, key: str) -> dict[str, Any]:
    patterns = adapter.config.get(key) or {}
    try:
        for pattern in patterns:
            re.compile(_PATTERN.format(pattern))
        return dict(patterns)
    except (TypeError, ValueError, re.error, OverflowError, RecursionError) as error:
        raise _invalid(adapter, f"{key} {patterns!r:.80}") from error


def _invalid(adapter: Adapter, what: str) -> SourceError:
    path = adapter.folder / CONFIG
    return SourceError(f"{path} has the invalid {what}.", "Download the adapter again.")


def _refusal(adapter: Adapter, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The adapter in {adapter.folder} {why}, which hisvd cannot merge.", _HINT
    )


def on_compressed(name: str) -> tuple[str, str]:
    """Return message and hint for an adapter on a compressed checkpoint."""
    return (
        f"{name} is a compressed checkpoint with a LoRA adapter, which hisvd cannot merge.",
        _HINT,
    )


@dataclass(frozen=True)
class _Pair:
    """The update of a weight: names of A ``[r, n]`` and B ``[m, r]``, and the scale."""

    a: str
    b: str
    scale: float


def merged(adapter: Adapter, weights: Weights) -> tuple[Weights, list[str]]:
    """Return weights with the adapter merged in when they are read, and notes about it.

    Raises:
        UnsupportedModelError: the adapter is more than low-rank updates.
        SourceError: it does not match the weights, or cannot be read.
    """
    check_adapter(adapter)
    held = open_file(adapter.files[1])
    recipes = dict(weights.recipes)
    whole = _whole(adapter, held, weights)
    for name, given in whole.items():
        recipes[name] = partial(_replaced, weights, name, held, given)
    beneath = replace(weights, recipes=dict(recipes))
    pairs = _pairs(adapter, held)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    changed = set(whole)
    for module, pair in pairs.items():
        name = _stored_name(adapter, f"{module}.weight", weights)
        _check_shapes(adapter, pair, held, weights.infos[name].shape, transposed)
        recipes[name] = partial(_add, beneath, name, held, pair, transposed)
        changed.add(name)
    if not changed:
        raise SourceError(f"{adapter.files[1]} has no tensors.", "Download the adapter again.")
    note = f"The adapter in {adapter.folder} is merged into {len(changed)} tensors."
    view = replace(weights, recipes=recipes, parts=(*weights.parts, *adapter.files))
    return view, [note]


def _whole(adapter: Adapter, held: Weights, weights: Weights) -> dict[str, str]:
    """Return name on disk → name in the adapter for tensors that the adapter replaces.

    Raises:
        UnsupportedModelError: a tensor is of an unsupported kind, or has another shape.
        SourceError: the model does not have the tensor.
    """
    found = {}
    for given in held:
        if _HALF.search(given):
            continue
        if _OTHER.search(given):
            raise _refusal(adapter, f"contains {given}")
        wanted = given.removeprefix(_PREFIX).replace(".base_layer.", ".")
        name = _stored_name(adapter, wanted, weights)
        here, there = held.infos[given].shape, weights.infos[name].shape
        if here != there:
            raise _refusal(adapter, f"resizes {name} from {list(there)} to {list(here)}")
        found[name] = given
    return found


def _pairs(adapter: Adapter, held: Weights) -> dict[str, _Pair]:
    """Return module → its A and B. Raises SourceError."""
    found: dict[str, dict[str, str]] = {}
    for name in held:
        if match := _HALF.search(name):
            module = name[: match.start()].removeprefix(_PREFIX)
            found.setdefault(module, {})[match[1]] = name
    pairs = {}
    for module, halves in found.items():
        if halves.keys() != {"lora_A", "lora_B"}:
            raise SourceError(
                f"The adapter in {adapter.folder} lacks lora_A or lora_B of {module}.",
                "It is incomplete: download it again.",
            )
        rank = held.infos[halves["lora_A"]].shape[0]
        pairs[module] = _Pair(halves["lora_A"], halves["lora_B"], _scale(adapter, module, rank))
    return pairs


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """Return the scale s of a module. Raises SourceError."""
    alpha = adapter.config.get("lora_alpha", 8)
    patterns = adapter.config.get("alpha_pattern") or {}
    try:
        for key, value in patterns.items():
            if _matches(key, module):
                alpha = value
                break
        stabilised = adapter.config.get("use_rslora")
        scale = float(alpha) / (math.sqrt(rank) if stabilised else rank)
    except (AttributeError, TypeError, ValueError, re.error, ArithmeticError) as error:
        raise _invalid(adapter, f"lora_alpha or alpha_pattern for {module}") from error
    if not abs(scale) < _LARGEST_SCALE:
        raise _invalid(adapter, f"lora_alpha {alpha} for {module}")
    return scale


def _matches(pattern: str, module: str) -> bool:
    """Return whether a name pattern of PEFT matches a module.

    Raises:
        ValueError: the regular expression may take exponential time.
    """
    repeats = re.sub(r"\\.", "", pattern)
    if len(pattern) > _LONGEST_PATTERN or re.search(r"\)[*+?{]", repeats):
        raise ValueError(f"the pattern {pattern[:_LONGEST_PATTERN]} repeats a group")
    if len(re.findall(r"[*+{]", repeats)) > _MOST_REPEATS:
        raise ValueError(f"the pattern {pattern} has too many repetitions")
    return re.match(_PATTERN.format(pattern), module) is not None


def _stored_name(adapter: Adapter, wanted: str, weights: Weights) -> str:
    """Return the name on disk of a tensor, which may have another prefix. Raises SourceError."""
    if wanted in weights:
        return wanted
    near = [n for n in weights if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
    if len(near) != 1:
        raise SourceError(
            f"The adapter in {adapter.folder} changes {wanted}, which is not a stored tensor of "
            "the model.",
            "The adapter belongs to another model, or the tensor is tied; merge it with PEFT.",
        )
    return near[0]


def _check_shapes(
    adapter: Adapter, pair: _Pair, held: Weights, shape: tuple[int, ...], transposed: bool
) -> None:
    a, b = held.infos[pair.a].shape, held.infos[pair.b].shape
    given = (b[0], a[1]) if len(a) == len(b) == 2 and b[1] == a[0] else ()
    if (given[::-1] if transposed else given) != shape:
        raise SourceError(
            f"The adapter in {adapter.folder} has {pair.a} {list(a)} and B {list(b)}, which do not "
            f"match a weight {list(shape)}.",
            "It belongs to another model.",
        )


def _replaced(weights: Weights, name: str, held: Weights, given: str) -> Tensor:
    import torch

    return held.read(given).to(getattr(torch, weights.infos[name].dtype))


def _add(weights: Weights, name: str, held: Weights, pair: _Pair, transposed: bool) -> Tensor:
    """Return a weight with its update added in float32, rounded once."""
    import torch

    weight = weights.read(name)
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = held.read(pair.b).to(wide) @ held.read(pair.a).to(wide)
    product = product.T if transposed else product
    return weight.to(wide).add_(product, alpha=pair.scale).to(weight.dtype)
