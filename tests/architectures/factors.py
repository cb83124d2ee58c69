"""Factors of a checkpoint, read and multiplied without any code of hisvd."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

_U = ".weight_u"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return name → tensor of all safetensors files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def ranks(folder: Path) -> dict[str, int]:
    """Return low-rank layer → rank, of the config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, int] = config["quantization_config"]["ranks"]
    return found


def products(folder: Path) -> dict[str, Tensor]:
    """Return low-rank layer → its weight ``[m, n]``, or ``[E, m, n]`` of a stack."""
    tensors = read_tensors(folder)
    return {name: _product(tensors, stem_of(name, tensors)) for name in ranks(folder)}


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


def _product(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    v, u = tensors[f"{stem}.weight"].double(), tensors[f"{stem}{_U}"].double()
    order = tensors.get(f"{stem}.weight_order")
    if order is None:
        return u @ v
    return torch.cat([v, u @ v])[order.long()]  # where each output stands among these rows


def dense_parameter(model: nn.Module, name: str) -> tuple[nn.Parameter, bool]:
    """Return the parameter of a layer or of a stack, and whether it stores its transpose."""
    parent, _, leaf = name.rpartition(".")
    found: Any = getattr(model.get_submodule(parent), leaf)
    if isinstance(found, nn.Parameter):
        return found, bool(getattr(model.get_submodule(parent), "is_transposed", False))
    return found.weight, type(found).__name__ == "Conv1D"


def multiply_out(model: nn.Module, folder: Path) -> None:
    """Replace the weights of a dense model by the products of a checkpoint's factors."""
    with torch.no_grad():
        for name, product in products(folder).items():
            parameter, is_transposed = dense_parameter(model, name)
            wanted = product.transpose(-2, -1) if is_transposed else product
            if wanted.shape != parameter.shape:  # stacks whose class does not say
                wanted = wanted.transpose(-2, -1)
            assert wanted.shape == parameter.shape, (
                f"{name}: the factors make {list(product.shape)}, the model has "
                f"{list(parameter.shape)}."
            )
            parameter.copy_(wanted)
