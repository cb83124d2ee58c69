"""Maps the tensors of a model to those on disk, through the conversion rules of transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hisvd_cli.modeling.sources.stored_names import find_names, without_inner
from hisvd_cli.modeling.sources.weights import Derived
from hisvd_cli.modeling.structure.conversion import (
    Conversion,
    Converted,
    convert_names,
)
from hisvd_cli.modeling.structure.expert_linears import ExpertLinears
from hisvd_cli.modeling.structure.linearize import TurnedLinear
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hisvd_cli.modeling.sources.source import Source
    from hisvd_cli.modeling.sources.weights import Weights


_KEPT = "_naming"


@dataclass(frozen=True)
class Naming:
    """Where the tensors of a model come from.

    Attributes:
        names: name in the model → name to read in ``source.weights``: on disk, or of a derived
            tensor.
        by_rules: names of the tensors that conversion rules of transformers rename or make.
    """

    names: dict[str, str]
    by_rules: frozenset[str]


@dataclass(frozen=True)
class _Origin:
    """A tensor of transformers' structure, and how one of the working model is made from it.

    Attributes:
        name: in transformers' structure.
        expert: index of the slice that is taken; None for the whole.
        turned: whether it is transposed.
        count: number of slices.
    """

    name: str
    expert: int | None = None
    turned: bool = False
    count: int = 1


def find_naming(model: PreTrainedModel, source: Source) -> Naming:
    """Return how the tensors of a model are named on disk; unknown ones are left out.

    Tensors that have to be computed are added to ``source.weights.derived``. The result is cached
    with the source, because the rules take seconds for thousands of experts.

    Raises:
        SourceError: an expert of a stack is missing on disk.
    """
    kept = vars(source).setdefault(_KEPT, {})
    forms = (ExpertLinears, TurnedLinear)
    working = any(isinstance(module, forms) for module in model.modules())
    key = (type(model), working, tuple(model.state_dict()))
    if key not in kept:
        kept[key] = _naming(model, source)
    naming: Naming = kept[key]
    return naming


def _naming(model: PreTrainedModel, source: Source) -> Naming:
    origins = {name: _Origin(name) for name in model.state_dict()} | _origins(model)
    wanted = list(dict.fromkeys(origin.name for origin in origins.values()))
    weights = source.weights
    literal = find_names(wanted, weights, model.base_model_prefix)
    conversion = convert_names(_Structure(model), wanted, without_inner(weights))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names, by_rules = {}, set()
    for name, origin in origins.items():
        found = _found(origin, literal, conversion)
        if found is None:
            continue
        if isinstance(found, Converted) and (lost := found.missing_expert(origin.count)):
            raise SourceError(
                f"{source.name} lacks the tensor {lost}, which its config requires.",
                "The files are incomplete or of another architecture: download the model again.",
            )
        plain = origin.expert is None and not origin.turned
        if isinstance(found, str) and plain:
            names[name] = found
        else:
            names[name] = f"converted:{name}"
            weights.derived[names[name]] = _derived(weights, origin, found, shapes[name])
        if origin.name in conversion.converted or origin.name not in literal:
            by_rules.add(name)
    # Buffers may be infinite, such as bounds of values that are not clipped.
    weights.unchecked.update(names[n] for n, _ in model.named_buffers() if n in names)
    return Naming(names, frozenset(by_rules))


def names_in_model(
    model: PreTrainedModel, expected: Collection[str], stored: Iterable[str]
) -> tuple[dict[str, str], frozenset[str]]:
    """Return name on disk → name in the model, and the tensors that are made from others.

    Args:
        model: the model in the form of transformers.
        expected: names of its tensors.
        stored: names on disk. Those that no rule maps to an expected name keep their own.
    """
    names = list(stored)
    conversion = convert_names(_Structure(model), expected, {name: name for name in names})
    found = {on_disk: name for name, on_disk in conversion.renamed.items()}
    for name, made in conversion.converted.items():
        found |= dict.fromkeys(made.stored, name)
    return {name: found.get(name, name) for name in names}, frozenset(conversion.converted)


def _found(
    origin: _Origin, literal: Mapping[str, str], conversion: Conversion
) -> str | Converted | None:
    for known in (conversion.converted, conversion.renamed, literal):
        if origin.name in known:
            return known[origin.name]
    return None


def _origins(model: PreTrainedModel) -> dict[str, _Origin]:
    """Return the origin of every tensor that the working model holds in another form."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinears):
            for i in range(len(module)):
                origin = _Origin(name, i, module.transposed, len(module))
                found[f"{name}.{i}.weight"] = origin
        elif isinstance(module, TurnedLinear):
            found[f"{name}.weight"] = _Origin(f"{name}.weight", turned=True)
    return found


class _Structure:
    """What conversion rules read of a model: its config, and its tensors in transformers' form."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.config = model.config
        self.base_model_prefix = model.base_model_prefix

    def named_modules(self) -> Any:
        """Yield the modules of the model."""
        return self._model.named_modules()

    def get_parameter(self, name: str) -> Tensor:
        """Return a tensor without data in the shape that transformers gives it."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        leaf = getattr(module, name.rpartition(".")[2])
        if isinstance(leaf, ExpertLinears):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        tensor: Tensor = leaf
        return tensor.T if isinstance(module, TurnedLinear) else tensor


def _derived(
    weights: Weights,
    origin: _Origin,
    found: str | Converted,
    shape: tuple[int, ...],
) -> Derived:
    stored = (found,) if isinstance(found, str) else found.stored
    dtype = weights.info(stored[0]).dtype
    width = getattr(torch, dtype).itemsize
    info = TensorInfo(dtype, shape, 0, prod(shape) * width)
    return Derived(info, partial(_make, weights, origin, found), stored)


def _make(weights: Weights, origin: _Origin, found: str | Converted) -> Tensor:
    if origin.expert is None:
        whole = weights.read(found) if isinstance(found, str) else found.read(weights)
    elif isinstance(found, Converted):
        whole = found.read_expert(weights, origin.expert, origin.count)
    else:
        whole = weights.read_slice(found, origin.expert)
    return whole.T.contiguous() if origin.turned else whole
