"""Factors of a checkpoint, read and multiplied without any code of hisvd."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

_U = ".weight_u"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return name → tensor of all safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def ranks(folder: Path) -> dict[str, int]:
    """Return low-rank layer → rank, of the config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, int] = config["quantization_config"]["ranks"]
    return found


def factors(model: PreTrainedModel, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return low-rank layer → U ``[m, r]`` and V ``[r, n]``; a stack has one of each per expert.

    Names on disk become those of the model by the renamings of transformers.
    """
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        tensors[name] = tensor
        tensors.setdefault(apply_renamings(name, rules), tensor)
    return {name: _pair(tensors, stem_of(name, tensors)) for name in ranks(folder)}


def stem_of(name: str, tensors: Iterable[str]) -> str:
    """Return what the tensors of a layer begin with on disk, where its prefix may be another one.

    Raises:
        AssertionError: there is none, or several fit equally well.
    """
    parts = name.split(".")
    stems = [key.removesuffix(_U) for key in tensors if key.endswith(_U)]

    def shared(stem: str) -> int:
        pairs = list(zip(reversed(stem.split(".")), reversed(parts), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    best = max(map(shared, stems), default=0)
    fitting = [stem for stem in stems if shared(stem) == best]
    exact = [stem for stem in fitting if stem == name]
    assert best > 1, f"There is no {name}{_U} in the checkpoint."
    assert len(exact or fitting) == 1, f"Several tensors fit {name}: {fitting}."
    return (exact or fitting)[0]


def _pair(tensors: Mapping[str, Tensor], stem: str) -> tuple[Tensor, Tensor]:
    v, u = tensors[f"{stem}.weight"].double(), tensors[f"{stem}{_U}"].double()
    order = tensors.get(f"{stem}.weight_order")
    if order is not None:  # where each output stands among r independent rows and the others
        u = torch.cat([torch.eye(len(v), dtype=v.dtype), u])[order.long()]
    return u, v


def dense_parameter(model: nn.Module, name: str) -> tuple[nn.Parameter, bool]:
    """Return the parameter of a layer or of a stack, and whether it stores its transpose."""
    parent, _, leaf = name.rpartition(".")
    found: Any = getattr(model.get_submodule(parent), leaf)
    if isinstance(found, nn.Parameter):
        return found, bool(getattr(model.get_submodule(parent), "is_transposed", False))
    return found.weight, type(found).__name__ == "Conv1D"


def dense_weights(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return low-rank layer → its weight in a dense model ``[m, n]`` or ``[E, m, n]``, as a view.

    Raises:
        AssertionError: the shapes of a layer's factors do not fit the model.
    """
    found = {}
    for name, (u, v) in factors(model, folder).items():
        parameter, is_transposed = dense_parameter(model, name)
        shape = (*parameter.shape[:-2], u.shape[-2], v.shape[-1])
        # Some classes of experts do not say that they store the transpose.
        weight = parameter.data.mT if is_transposed or parameter.shape != shape else parameter.data
        assert weight.shape == shape, (
            f"{name}: the factors make {list(shape)}, the model has {list(parameter.shape)}."
        )
        found[name] = weight
    return found


def multiply_out(model: PreTrainedModel, folder: Path) -> None:
    """Replace the weights of a dense model by the products of a checkpoint's factors."""
    weights = dense_weights(model, folder)
    for name, (u, v) in factors(model, folder).items():
        weights[name].copy_(u @ v)


def projection_error(weight: Tensor, u: Tensor, v: Tensor) -> float:
    """Return how far U V is from a projection of the weight, relative to the weight.

    A truncation that is optimal for any inputs keeps r directions of the outputs: U V = Q Qᵀ W,
    with Q an orthonormal basis of U.
    """
    q = torch.linalg.qr(u).Q
    weight = weight.double()
    return float((q @ (q.mT @ weight) - u @ v).norm() / weight.norm())
