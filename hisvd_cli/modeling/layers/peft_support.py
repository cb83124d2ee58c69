"""Support for PEFT LoRA adapters on low-rank and quantized layers.

An adapter adds ``s B A x`` to ``y = U(Vx) + b``. Merging it gives factors of the summed ranks,
``[U, sB] [V; A]``, which is exact; if that rank would exceed the full rank, or with pivoted
storage, the layer becomes dense. Quantized layers accept adapters, but cannot be merged with them.

This file is copied into every checkpoint (see ``transformers_plugin.remote_code_files``), so it
only imports torch, the other copied files, and peft if it is in use.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .import_hooks import when_imported
from .lowrank import LowRankLinear
from .quantized import QuantizedLinear, QuantizedLowRankLinear
from .replacement import dense_layer

_DISPATCHERS = "peft.tuners.lora.model"  # the module that selects the adapter class of a layer
_PLAIN_STARTS = ("gaussian", "orthogonal")
"""Adapter initializations that do not need the layer's weight."""


def support_adapters() -> None:
    """Register low-rank and quantized layers with peft, once peft is imported."""
    when_imported(_DISPATCHERS, _extend)


def _extend(module: Any) -> None:
    """Extend peft's dispatch function by low-rank and quantized layers."""
    try:  # transformers treats imports outside of try as requirements of the checkpoint
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise
    original = module.dispatch_default
    adapted = _adapted_class()

    def dispatch(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        whole = kwargs.get("parameter_name") is None
        if not whole and isinstance(base, QuantizedLinear | QuantizedLowRankLinear):
            raise ValueError(
                "A quantized layer cannot have an adapter on a single factor: name the whole layer "
                "in target_modules."
            )
        if not whole or not isinstance(base, LowRankLinear | QuantizedLinear):
            made: nn.Module | None = original(target, adapter_name, **kwargs)
            return made
        _check(kwargs.get("config") or kwargs.get("lora_config"))
        kwargs.pop("lora_config", None)  # peft before 0.18 unpacks it itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            layer: nn.Module = adapted(target, adapter_name, **kwargs)
        return layer

    module.dispatch_default = dispatch


def _check(config: Any) -> None:
    """Raise ``ValueError`` for adapters that need the dense weight of their layer."""
    if getattr(config, "use_dora", False):
        raise ValueError("DoRA needs dense weights, which low-rank layers do not have.")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} needs dense weights, which low-rank layers do not have. "
            "Use True or 'gaussian'."
        )


def _adapted_class() -> type[nn.Module]:
    """Return the subclass of peft's LoRA layer for low-rank and quantized layers."""
    try:
        from peft.tuners.lora.layer import Linear
        from peft.tuners.tuners_utils import check_adapters_to_merge
    except ImportError:
        raise

    class LowRankLora(Linear):
        """LoRA adapters on a low-rank or quantized layer."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Merge the adapters into the base layer.

            Raises:
                ValueError: the layer is quantized, merged values are not finite, or an adapter has
                    a bias and the layer has none.
            """
            for name in check_adapters_to_merge(self, adapter_names) or ():
                if name not in self.lora_A:
                    continue
                base = self.get_base_layer()
                merged = _merged(base, *self._matrices(name))
                if safe_merge and not all(bool(p.isfinite().all()) for p in merged.parameters()):
                    raise ValueError(f"Merging the adapter {name} gives non-finite values.")
                # Bypasses nn.Module, which would register it as a submodule.
                self.__dict__.setdefault("_plain", base)
                self.base_layer = merged
                self.merged_adapters.append(name)

        def _matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
            """Return A ``[k, n]``, s B ``[m, k]`` and the adapter's addition to the bias."""
            a: Any = self.lora_A[name]
            b: Any = self.lora_B[name]
            added = None if b.bias is None else b.bias.data * self.scaling[name]
            return a.weight.data, b.weight.data * self.scaling[name], added

        def unmerge(self) -> None:
            """Restore the layer from before the first merge."""
            self.base_layer = self.__dict__.pop("_plain", self.base_layer)
            self.merged_adapters.clear()

    return LowRankLora


@torch.no_grad()
def _merged(base: nn.Module, a: Tensor, b: Tensor, added: Tensor | None) -> nn.Module:
    """Return ``base`` with an adapter merged in. Raises ``ValueError``."""
    if isinstance(base, QuantizedLinear | QuantizedLowRankLinear):
        raise ValueError(
            "Adapters cannot be merged into quantized layers. Merge them into the checkpoint "
            "before it is quantized, or call model.dequantize() before get_peft_model."
        )
    bias = getattr(base, "bias", None)
    if added is not None and bias is None:
        raise ValueError("The bias of an adapter cannot be merged into a layer without one.")
    wide = b.float() @ a.float()
    if not isinstance(base, LowRankLinear):  # an earlier merge made it dense
        return _dense(base, _rows(base).float() + wide, added)
    rank = base.rank + len(a)
    if type(base) is not LowRankLinear or rank > min(base.in_features, base.out_features):
        return _dense(base, base.dense_weight(torch.float32) + wide, added)
    like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
    pair = LowRankLinear(base.in_features, base.out_features, rank, bias is not None, **like)
    pair.conv1d = base.conv1d
    pair.weight.copy_(torch.cat([base.weight, a.to(base.weight.dtype)]))
    pair.weight_u.copy_(torch.cat([base.weight_u, b.to(base.weight_u.dtype)], 1))
    if pair.bias is not None:
        pair.bias.copy_(_biased(base, added))
    return pair.requires_grad_(False)


def _rows(dense: Any) -> Tensor:
    """Return the weight ``[m, n]`` of a dense layer."""
    weight: Tensor = dense.weight
    return weight if isinstance(dense, nn.Linear) else weight.T


def _dense(base: Any, weight: Tensor, added: Tensor | None) -> nn.Module:
    """Return a dense layer with the weight ``[m, n]`` and the bias of ``base``."""
    kind = getattr(base, "conv1d", None if isinstance(base, nn.Linear) else type(base))
    bias = None if base.bias is None else _biased(base, added)
    return dense_layer(weight.to(base.weight.dtype), bias, kind).requires_grad_(False)


def _biased(base: Any, added: Tensor | None) -> Tensor:
    """Return the bias of ``base`` with that of an adapter added."""
    bias: Tensor = base.bias.detach().clone()
    return bias if added is None else bias + added.to(bias.dtype)
