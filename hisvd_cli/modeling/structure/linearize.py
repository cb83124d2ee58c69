"""Replaces the forms of linear layers that transformers uses by ``nn.Linear``.

The result computes the same, and is what hisvd works on: hooks and decomposition only know
``nn.Linear``. It is never saved; checkpoints keep the form of transformers.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from hisvd_cli.modeling.structure.expert_linears import separate_experts


class TurnedLinear(nn.Linear):
    """A linear layer in place of a ``Conv1D``, which stores its weight transposed."""


def linearize(blocks: nn.Module) -> None:
    """Replace every ``Conv1D`` and every stack of experts in decoder blocks, in place."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(blocks.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Conv1D):
                setattr(parent, name, _turned(module))
    separate_experts(blocks)


def _turned(module: nn.Module) -> TurnedLinear:
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter, module.bias)
    n, m = weight.shape
    linear = TurnedLinear(n, m, device=weight.device, dtype=weight.dtype)
    linear.bias = bias
    return linear
