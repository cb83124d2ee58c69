"""Which linears of a model can be factored, and how they are clustered: by structure alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hisvd_cli.utils.errors import UnsupportedModelError, UsageError

Shape = tuple[int, int]
"""Outputs m and inputs n of a sublayer."""
_HINT = (
    "Supported: decoders whose blocks are made of torch.nn.Linear (llama, mistral, qwen, opt …)."
)


@dataclass(frozen=True)
class Sublayer:
    """One ``nn.Linear`` of a decoder block.

    Attributes:
        name: full name in the model, such as ``model.layers.0.self_attn.q_proj``.
        layer: index of its block.
        cluster: its type, such as ``q_proj``.
        shape: ``(m, n)`` = (outputs, inputs).
    """

    name: str
    layer: int
    cluster: str
    shape: Shape


def find_sublayers(prefix: str, layers: Sequence[nn.Module]) -> list[Sublayer]:
    """Return the linears of all blocks, in the order of their definition.

    Args:
        prefix: name of the list of blocks in the model, such as ``model.layers``.
        layers: the blocks (they may lie on the meta device).

    Raises:
        UnsupportedModelError: a block holds a weight that is no plain linear's.
    """
    found: list[tuple[int, str, nn.Linear]] = []
    for index, layer in enumerate(layers):
        block = f"{prefix}.{index}"
        _check_experts(block, layer)
        _check_matrices(block, layer)
        linears = [(index, n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise UnsupportedModelError(f"{block} holds no torch.nn.Linear.", _HINT)
        found += linears
    clusters = _cluster_names(list(dict.fromkeys(name for _, name, _ in found)))
    return [
        Sublayer(f"{prefix}.{i}.{name}", i, clusters[name], (m.out_features, m.in_features))
        for i, name, m in found
    ]


def _check_experts(block: str, layer: nn.Module) -> None:
    """Refuse a mixture of experts: a list of modules with linears, or one stacked tensor."""
    for name, module in layer.named_modules():
        parts = list(module) if isinstance(module, nn.ModuleList) else []
        if any(isinstance(m, nn.Linear) for part in parts for m in part.modules()):
            raise UnsupportedModelError(
                f"{block}.{name} is a list of {len(parts)} modules with weights of their own: "
                "mixtures of experts are not supported.",
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
    """Refuse a matrix that is no linear's: it could not be found, and would stay as it is."""
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
    """Return the shortest distinct ending of each name: ``q_proj``, or ``mlp.dense`` where the
    last part alone stands for several."""
    last = Counter(name.rpartition(".")[2] for name in names)
    return {
        name: name if last[name.rpartition(".")[2]] > 1 else name.rpartition(".")[2]
        for name in names
    }


def select(
    sublayers: Sequence[Sublayer], include: Sequence[str], exclude: Sequence[str]
) -> list[Sublayer]:
    """Return the sublayers that match a pattern of ``include`` (all where it is empty) and none of
    ``exclude``. A pattern is a shell glob of the full name, the cluster, or any ending of the name.

    Raises:
        UsageError: a pattern that matches nothing, or a selection that is empty.
    """
    for pattern in [*include, *exclude]:
        if not any(_matches(s, pattern) for s in sublayers):
            raise UsageError(
                f"The pattern '{pattern}' matches no sublayer.",
                f"Sublayer types here: {', '.join(dict.fromkeys(s.cluster for s in sublayers))}.",
            )
    chosen = [
        s
        for s in sublayers
        if (not include or any(_matches(s, p) for p in include))
        and not any(_matches(s, p) for p in exclude)
    ]
    if not chosen:
        raise UsageError("--include and --exclude leave no sublayer.", "Loosen the patterns.")
    return chosen


def _matches(sublayer: Sublayer, pattern: str) -> bool:
    return (
        fnmatchcase(sublayer.name, pattern)
        or fnmatchcase(sublayer.cluster, pattern)
        or fnmatchcase(sublayer.name, f"*.{pattern}")
    )
