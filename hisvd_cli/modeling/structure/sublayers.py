"""Finds the linear layers of a model's blocks, and groups them by type."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import cast

import torch
from torch import nn

from hisvd_cli.modeling.layers.shapes import Shape, copies, is_stack
from hisvd_cli.modeling.structure.expert_linears import ExpertLinears
from hisvd_cli.utils.errors import UnsupportedModelError, UsageError

_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data_ptr))")
_HINT = "Supported: decoders whose blocks have linear layers."


@dataclass(frozen=True)
class Sublayer:
    """One linear layer of a decoder block, or a stack of experts that share a rank.

    Attributes:
        name: full name in the model, such as ``model.layers.0.self_attn.q_proj``.
        layer: index of its block.
        cluster: its type, such as ``q_proj``.
        shape: ``(m, n)`` = (outputs, inputs), or ``(E, m, n)`` for a stack of E experts.
    """

    name: str
    layer: int
    cluster: str
    shape: Shape

    @property
    def members(self) -> list[str]:
        """Names of its linear modules in the working model; one per expert for a stack."""
        if not is_stack(self.shape):
            return [self.name]
        return [f"{self.name}.{expert}" for expert in range(copies(self.shape))]


def find_sublayers(prefix: str, layers: Sequence[nn.Module]) -> list[Sublayer]:
    """Return the linear layers and expert stacks of all blocks, in order of definition.

    Left out, and thus dense, are routers, layers whose weight the model's code uses otherwise than
    by calling the layer, and everything that is not a linear layer.

    Args:
        prefix: name of the list of blocks in the model, such as ``model.layers``.
        layers: the blocks of a working model, possibly on the meta device.

    Raises:
        UnsupportedModelError: no block has a linear layer.
    """
    found = [
        (index, name, shape)
        for index, layer in enumerate(layers)
        if "CrossAttention" not in type(layer).__name__  # only run with images
        for name, shape in _linears(layer)
    ]
    if not found:
        raise UnsupportedModelError(f"The blocks in {prefix} have no linear layers.", _HINT)
    clusters = _cluster_names(list(dict.fromkeys(name for _, name, _ in found)))
    return [Sublayer(f"{prefix}.{i}.{name}", i, clusters[name], s) for i, name, s in found]


def _linears(layer: nn.Module) -> list[tuple[str, Shape]]:
    """Return local name and shape of each linear layer and expert stack of a block."""
    found: list[tuple[str, Shape]] = []
    for name, module in layer.named_modules():
        parent = layer.get_submodule(name.rpartition(".")[0])
        if isinstance(module, ExpertLinears):
            m, n = module.linear(0).weight.shape
            found.append((name, (len(module), m, n)))
        elif isinstance(module, nn.Linear) and not _stays_dense(parent, name, module):
            found.append((name, (module.out_features, module.in_features)))
    return found


def _stays_dense(parent: nn.Module, name: str, linear: nn.Linear) -> bool:
    """Return whether a linear layer cannot be replaced by two, or is a router."""
    if min(linear.weight.shape) == 1 or isinstance(parent, ExpertLinears):
        return True
    if getattr(linear, "shared", False):  # stored once for several blocks
        return True
    if type(linear).forward is not nn.Linear.forward and not _is_linear(linear):
        return True
    experts = next((len(m) for m in parent.modules() if isinstance(m, ExpertLinears)), 0)
    if experts and linear.out_features == experts:
        return True
    kind: Hashable = type(parent)  # type: ignore[assignment]  # classes are hashable
    return name.rpartition(".")[2] in _read_weights(kind)


def _is_linear(linear: nn.Linear) -> bool:
    """Return whether a subclass of ``nn.Linear`` maps n inputs to m outputs, instead of groups."""
    x = torch.empty(1, linear.in_features, device="meta", dtype=linear.weight.dtype)
    try:
        y = linear(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, linear.out_features)


@cache
def _read_weights(kind: Hashable) -> frozenset[str]:
    """Return the names of layers whose weight the code of a module class reads itself, as fused
    kernels of state-space models do; reading only its dtype or device does not count."""
    try:
        source = inspect.getsource(cast(type, kind))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(_READ.findall(source))


def _cluster_names(names: Sequence[str]) -> dict[str, str]:
    """Return the shortest distinct suffix of each name: ``q_proj``, or ``mlp.dense`` if the last
    part is ambiguous or a number."""
    last = Counter(name.rpartition(".")[2] for name in names)
    return {
        name: name if last[leaf] > 1 or leaf.isdigit() else leaf
        for name in names
        for leaf in [name.rpartition(".")[2]]
    }


def select(
    sublayers: Sequence[Sublayer], include: Sequence[str], exclude: Sequence[str]
) -> list[Sublayer]:
    """Return the sublayers that match a pattern of ``include`` (all if it is empty) and none of
    ``exclude``. A pattern is a shell glob for the full name, the cluster, or a suffix of the name.

    Raises:
        UsageError: a pattern matches nothing, or the selection is empty.
    """
    for pattern in [*include, *exclude]:
        if not any(_matches(s, pattern) for s in sublayers):
            raise UsageError(
                f"The pattern '{pattern}' does not match any layer.",
                f"Layer types: {', '.join(dict.fromkeys(s.cluster for s in sublayers))}.",
            )
    chosen = [
        s
        for s in sublayers
        if (not include or any(_matches(s, p) for p in include))
        and not any(_matches(s, p) for p in exclude)
    ]
    if not chosen:
        raise UsageError(
            "`plan.include` and `plan.exclude` select no layer.", "Use less restrictive patterns."
        )
    return chosen


def _matches(sublayer: Sublayer, pattern: str) -> bool:
    return (
        fnmatchcase(sublayer.name, pattern)
        or fnmatchcase(sublayer.cluster, pattern)
        or fnmatchcase(sublayer.name, f"*.{pattern}")
    )
