"""Finds the linear layers of a model's blocks, and groups them by type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hisvd_cli.modeling.layers.shapes import Shape, copies, is_stack
from hisvd_cli.utils.errors import UnsupportedModelError, UsageError

_HINT = "Supported: decoders with torch.nn.Linear layers, such as llama, mistral, qwen and opt."


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
    """Return the linear layers of all blocks, in order of definition.

    Args:
        prefix: name of the list of blocks in the model, such as ``model.layers``.
        layers: the blocks, possibly on the meta device.

    Raises:
        UnsupportedModelError: a block contains matrices that are not in a torch.nn.Linear.
    """
    found: list[tuple[int, str, nn.Linear]] = []
    for index, layer in enumerate(layers):
        block = f"{prefix}.{index}"
        _check_experts(block, layer)
        _check_matrices(block, layer)
        linears = [(index, n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise UnsupportedModelError(f"{block} has no torch.nn.Linear layers.", _HINT)
        found += linears
    clusters = _cluster_names(list(dict.fromkeys(name for _, name, _ in found)))
    return [
        Sublayer(f"{prefix}.{i}.{name}", i, clusters[name], (m.out_features, m.in_features))
        for i, name, m in found
    ]


def _check_experts(block: str, layer: nn.Module) -> None:
    """Reject mixtures of experts: a list of modules with linear layers, or a stacked tensor."""
    for name, module in layer.named_modules():
        parts = list(module) if isinstance(module, nn.ModuleList) else []
        if any(isinstance(m, nn.Linear) for part in parts for m in part.modules()):
            raise UnsupportedModelError(
                f"{block}.{name} is a list of {len(parts)} modules with linear layers: mixtures of "
                "experts are not supported.",
                _HINT,
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                raise UnsupportedModelError(
                    f"{_join(block, name, parameter_name)} ({type(module).__name__}) has "
                    f"{parameter.ndim} dimensions: stacked experts and convolutions are not "
                    "supported.",
                    _HINT,
                )


def _check_matrices(block: str, layer: nn.Module) -> None:
    """Reject matrices outside of torch.nn.Linear, which would not be compressed."""
    for name, module in layer.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and not isinstance(module, nn.Linear):
                raise UnsupportedModelError(
                    f"{_join(block, name, parameter_name)} is a matrix of a "
                    f"{type(module).__name__}, which is not a torch.nn.Linear.",
                    _HINT,
                )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _cluster_names(names: Sequence[str]) -> dict[str, str]:
    """Return the shortest distinct suffix of each name: ``q_proj``, or ``mlp.dense`` if the last
    part is ambiguous."""
    last = Counter(name.rpartition(".")[2] for name in names)
    return {
        name: name if last[name.rpartition(".")[2]] > 1 else name.rpartition(".")[2]
        for name in names
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
