"""Loads low-rank checkpoints in plain transformers: ``from_pretrained``, unchanged.

To transformers, ``hisvd`` is a quantization method that the checkpoint's ``config.json`` names:
``{"quant_method": "hisvd", "format_version": 1, "ranks": {name: rank}}``. While the model is still
without memory (on the meta device), each ``nn.Linear`` X that ``ranks`` names becomes a
``LowRankLinear`` with the tensors ``X.weight`` = V ``[r, n]``, ``X.weight_u`` = U ``[m, r]`` and
``X.bias`` ``[m]``; transformers then loads them like any others. Version 2 adds ``"storage":
"pivoted"``, for a ``PivotedLinear`` with ``X.weight`` ``[r, n]``, ``X.weight_u`` ``[m − r, r]`` and
``X.weight_order`` ``[m]``. Version 3, of either storage, adds ``"bits": {name: 8 or 4}`` and
``"group_size"``, for layers whose matrices are integers, low-rank or dense ones; ``quantized``
describes their tensors.

Importing this file registers the method. It is also the code that travels with a checkpoint, as
``modeling_hisvd.py``, for ``trust_remote_code=True`` where hisvd is not installed; so it imports
nothing of hisvd but the files that travel along, and raises plain ``ValueError`` (a wrong
``config.json``) and ``RuntimeError`` (wrong tensors). It serves transformers 4.57 and 5 alike.

The file is longer than others may be. The names of the files that travel along are part of the
checkpoint's format, and one more of them would not be enough to bring this one below 300 lines.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .import_hooks import when_imported  # noqa: F401 (4.57 copies only what this file names)
from .lowrank import FACTORS, LAYERS, LowRankLinear, PivotedLinear, Storage, is_order
from .peft_support import support_adapters
from .quantized import BITS, MATRICES, QUANTIZED, SCALE, QuantizedLinear, storage_with

if TYPE_CHECKING:  # at run time transformers may be in the middle of importing these
    from transformers import PretrainedConfig, PreTrainedModel

QUANT_METHOD = "hisvd"
FORMAT_VERSIONS = {"pair": 1, "pivoted": 2}
QUANTIZED_VERSION = 3
GROUP_SIZE = 64
MODELING_FILE = "modeling_hisvd.py"
AUTO_CLASS = "AutoModelForCausalLM"
AUTO_MAP = {
    AUTO_CLASS: "modeling_hisvd.HiSVDForCausalLM",
    "AutoConfig": "modeling_hisvd.HiSVDAutoConfig",
}

_LARGEST = (1 << 31) - 1  # no matrix has more rows or columns
_ADDED = {leaf for leaves in FACTORS.values() for leaf in leaves} - {"weight"}
_ADDED |= {leaf + SCALE for leaf in MATRICES}

_CASTS = ("half", "float")

# Where transformers, having loaded, sorts out which keys were missing and which were unexpected.
_REPORT_METHOD = "_adjust_missing_and_unexpected_keys"


class HiSVDConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a low-rank checkpoint.

    Args:
        ranks: the rank of each low-rank layer, by module name.
        format_version: of the checkpoint's layout: 1 for the storage pair, 2 for pivoted, 3 for
            either with bits.
        storage: how factors are stored.
        bits: 8 or 4 for each layer of integers, by module name; others are in full precision.
        group_size: columns that share a scale, with 4 bits.
        kwargs: what transformers hands back from ``config.json``; not used.

    Raises:
        ValueError: an unknown format version or storage, a rank that is not a positive integer, or
            bits or a group that there are not.
    """

    quant_method: Any  # a plain string: transformers' enumeration knows only its own methods

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        format_version: int = 1,
        storage: str = "pair",
        bits: Mapping[str, int] | None = None,
        group_size: int = GROUP_SIZE,
        **kwargs: Any,  # noqa: ARG002 (``quant_method`` itself comes back here)
    ) -> None:
        known = isinstance(storage, str) and storage in FORMAT_VERSIONS
        if not known or format_version != format_version_of(storage, bits):
            raise ValueError(
                f"This checkpoint has the hisvd format version {format_version!r} and the storage "
                f"{storage!r}, and this code reads version 1 (pair), 2 (pivoted) and 3 (either, "
                "quantized); it needs another version of hisvd."
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.ranks = _checked("ranks", ranks, "no positive integer", _is_positive)
        self.storage = cast(Storage, storage)
        self.bits = _checked("bits", bits, f"none of {BITS}", _is_width)
        if not _is_positive(group_size):
            raise ValueError(
                f"quantization_config.group_size is not a positive integer: {group_size}"
            )
        self.group_size = group_size

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds; plain pairs need not be named."""
        document: dict[str, Any] = super().to_dict()
        if self.storage == "pair":
            document.pop("storage")
        if not self.bits:
            del document["bits"], document["group_size"]
        return document


class HiSVDQuantizer(HfQuantizer):
    """Puts low-rank layers into a model before its weights are loaded, and checks them after.

    A missing, extra or misshapen low-rank tensor stops the load with a ``RuntimeError``, where
    transformers by itself would warn and go on with random numbers.
    """

    requires_calibration = True  # only checkpoints that are low-rank already can be loaded
    quantization_config: HiSVDConfig

    def __init__(self, quantization_config: HiSVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._report_seen = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Swap the layers of a model that is on the meta device, and have the load watched."""
        replace_linears(model, self.quantization_config)
        files = kwargs.get("checkpoint_files")  # transformers 5 only
        _check_file_shapes(model, files or ())
        self._watch_report(model)

    def _watch_report(self, model: PreTrainedModel) -> None:
        """Check the loading report of this one load.

        Transformers shows a quantizer no report, so this steps into the method of this one model
        that makes it. If a future version stops calling that method, the load is refused.
        """
        original = getattr(model, _REPORT_METHOD)

        def checked(*args: Any, **kwargs: Any) -> Any:
            delattr(model, _REPORT_METHOD)  # adapters that are loaded later are none of ours
            result = original(*args, **kwargs)
            # 5.3 and later amend a report in place; earlier versions return two lists of keys.
            report = next(iter((*args, *kwargs.values())))
            if hasattr(report, "missing_keys"):
                missing, unexpected = report.missing_keys, report.unexpected_keys
            else:
                missing, unexpected = result[:2]
            _refuse_missing(model, missing)
            _refuse_extra(model, self.quantization_config, unexpected)
            self._report_seen = True
            return result

        setattr(model, _REPORT_METHOD, checked)

    def update_expected_keys(
        self, model: PreTrainedModel, expected_keys: list[str], loaded_keys: list[str]
    ) -> list[str]:
        """Refuse low-rank tensors that will not be loaded (transformers 4 only).

        This is called once with all keys of the checkpoint and again without those that
        ``ignore_mismatched_sizes=True`` leaves out.
        """
        present = set(loaded_keys)
        absent = sorted(name for name in _low_rank_tensors(model) if name not in present)
        if absent:
            raise RuntimeError(
                f"The checkpoint lacks low-rank tensors, or has them in another shape than the "
                f"ranks in config.json say: {_listed(absent)}."
            )
        return expected_keys

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,  # noqa: ARG002 (transformers 4 passes the config)
    ) -> PreTrainedModel:
        """Check the layers as they now are, and have them saved with the code that loads them."""
        if not self._report_seen:
            raise RuntimeError(
                "This version of transformers loads models in a way that hisvd does not know, so "
                "it could not check that every low-rank tensor was found."
            )
        _refuse_misshapen(
            (name, tuple(tensor.shape), shape)
            for name, (tensor, shape) in _low_rank_tensors(model).items()
        )
        _refuse_disordered(model)
        _refuse_nonfinite(model)
        _allow_casts(model)
        _carry_code(model)
        return model

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        """Multiply the factors: ``model.dequantize()`` gives a plain dense model.

        Transformers 5 passes a dtype: the caller's, or else that of the model's config, which is
        a string once the model has been saved.

        Raises:
            ValueError: some layers are offloaded, so that their tensors are not in memory.
        """
        layers = replaced_layers(model)
        absent = [name for name, layer in layers.items() if layer.weight.is_meta]
        if absent:
            raise ValueError(
                f"Cannot multiply factors that are offloaded: {_listed(absent)}. Load the model "
                "with a device_map that keeps them in memory."
            )
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if dtype is None and self.quantization_config.bits:  # integers do not say
            dtype = model.dtype
        for name, layer in layers.items():
            _set_module(model, name, _dense_linear(layer, dtype))
        if dtype is not None and dtype != model.dtype:
            nn.Module.to(model, dtype)  # the other layers too: a model of two dtypes does not run
        _drop_code(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:  # noqa: ARG002
        """Low-rank models can be saved: their tensors are plain ones."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Low-rank models can be trained, their tensors are plain parameters; integers cannot."""
        return not self.quantization_config.bits

    @property
    def is_qat_trainable(self) -> bool:
        """As ``is_trainable``; without it the Trainer asks for adapters."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` sees two matrix products."""
        return True


class HiSVDForCausalLM:
    """What ``auto_map`` names: hands over to the model's own class, with low-rank layers.

    It is no model itself; ``from_pretrained`` gives a ``LlamaForCausalLM`` or whatever the
    checkpoint's architecture is. An architecture that is remote code itself cannot be served.
    """

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a low-rank checkpoint; takes what ``AutoModelForCausalLM.from_pretrained`` does."""
        from transformers import AutoModelForCausalLM

        kwargs["trust_remote_code"] = False  # this call is the remote code
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)
        return model

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Build a model of random weights in the checkpoint's low-rank shape."""
        from transformers import AutoModelForCausalLM

        kwargs["trust_remote_code"] = False
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
        replace_linears(model, HiSVDConfig(**dict(config.quantization_config)))
        _carry_code(model)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = AUTO_CLASS) -> None:
        """Do nothing: transformers calls this to have a class's own file saved with the model."""


class HiSVDAutoConfig:
    """What ``auto_map`` names for the config: hands over to the model's own class.

    Programs such as lm-eval read ``quantization_config`` before they load a model: by then this
    file must have been imported, so that transformers knows the quantizer.
    """

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Any:
        """Load the config; takes and returns what ``AutoConfig.from_pretrained`` does."""
        from transformers import AutoConfig

        kwargs["trust_remote_code"] = False  # this call is the remote code
        return AutoConfig.from_pretrained(path, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, as for the model."""


def remote_code_files() -> dict[str, Path]:
    """Return the code that a checkpoint carries: file name in the folder, path of the source."""
    here = Path(__file__)
    names = ("lowrank.py", "quantized.py", "peft_support.py", "import_hooks.py")
    inner = {name: here.with_name(name) for name in names}
    return {MODELING_FILE: here, **inner}


def format_version_of(storage: str, bits: Mapping[str, int] | None) -> int:
    """Return the version of a layout."""
    return QUANTIZED_VERSION if bits else FORMAT_VERSIONS[storage]


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers of a model by their names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def replaced_layers(model: nn.Module) -> dict[str, LowRankLinear | QuantizedLinear]:
    """Return the low-rank layers and the dense ones of integers by their names."""
    kinds = (LowRankLinear, QuantizedLinear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def replace_linears(model: PreTrainedModel, config: HiSVDConfig) -> None:
    """Put low-rank and quantized layers, of unset or random numbers, in the place of dense ones.

    Args:
        model: a model, on the meta device or not. One without a head (``AutoModel``) takes the
            names of the one with a head, and leaves out those that belong to the head.
        config: names the layers.

    Raises:
        ValueError: a name is no ``nn.Linear`` of the model, or its rank is too large.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    headless = _is_headless(model)
    wrong = []
    for name in {**config.ranks, **config.bits}:
        local = name.removeprefix(prefix) if headless and name not in modules else name
        linear = modules.get(local)
        if isinstance(linear, nn.Linear):
            _check_rank(linear, name, config)
            _set_module(model, local, _replacement(linear, name, config))
        elif not headless or name.startswith(prefix):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"quantization_config names modules that are not nn.Linear in {type(model).__name__}: "
            f"{_listed(wrong)}."
        )


def register() -> None:
    """Make the method known to transformers; the first registration in a process stays.

    A second copy of this file in the process (the installed one, or one from each checkpoint
    loaded with ``trust_remote_code=True``) is no error.
    """
    support_adapters()
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(HiSVDConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(HiSVDQuantizer)


def _is_positive(value: object) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _is_width(value: object) -> bool:
    return type(value) is int and value in BITS


def _checked(
    key: str, values: object, fault: str, is_right: Callable[[object], bool]
) -> dict[str, int]:
    """Return a mapping of ``quantization_config`` (None: an empty one). Raises ``ValueError``."""
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config.{key} must map names to integers: {values!r}.")
    wrong = [f"{name}: {value!r}" for name, value in values.items() if not is_right(value)]
    if wrong:
        raise ValueError(f"quantization_config.{key} holds what is {fault}: {_listed(wrong)}.")
    return dict(values)


def _listed(items: Iterable[str], limit: int = 5) -> str:
    """Join the first few items, and count the others."""
    shown = list(items)
    rest = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + rest


def _is_headless(model: PreTrainedModel) -> bool:
    """Tell whether this is the base model itself, as ``AutoModel`` gives it."""
    return not hasattr(model, model.base_model_prefix)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_rank(linear: nn.Linear, name: str, config: HiSVDConfig) -> None:
    """Raise ``ValueError`` if a rank is larger than the matrix that it is of."""
    largest = min(linear.in_features, linear.out_features)
    rank = config.ranks.get(name, 1)
    if rank > largest:
        raise ValueError(
            f"quantization_config.ranks gives {name} the rank {rank}, and its largest is {largest}."
        )


def _replacement(linear: nn.Linear, name: str, config: HiSVDConfig) -> nn.Module:
    """Return the layer that a config puts in the place of a dense one, with its sizes, device and
    dtype."""
    like: dict[str, Any] = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": linear.weight.device,
        "dtype": linear.weight.dtype,
    }
    if name in config.ranks:
        like["rank"] = config.ranks[name]
    if name in config.bits:
        like |= {"bits": config.bits[name], "group_size": config.group_size}
    layers = QUANTIZED if name in config.bits else LAYERS
    storage = storage_with(config.bits.get(name), config.storage)
    kind = layers[storage] if name in config.ranks else QuantizedLinear
    layer: nn.Module = kind(**like)
    return layer.train(linear.training)


def _dense_linear(layer: LowRankLinear | QuantizedLinear, dtype: torch.dtype | None) -> nn.Linear:
    """Return the dense layer that computes what a low-rank or quantized one does."""
    has_bias = layer.bias is not None
    dense = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    with torch.no_grad():
        dense.weight = nn.Parameter(layer.dense_weight(dtype), layer.weight.requires_grad)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().to(dtype), layer.bias.requires_grad)
    return dense.train(layer.training)


def _low_rank_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """Return the tensors of all replaced layers, each with the shape that it must have."""
    tensors: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
    for name, layer in replaced_layers(model).items():
        for leaf, shape in layer.stored_shapes().items():
            tensors[f"{name}.{leaf}"] = getattr(layer, leaf), shape
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias, (layer.out_features,)
    return tensors


def _check_file_shapes(model: PreTrainedModel, files: Iterable[str]) -> None:
    """Compare the shapes of low-rank tensors in safetensors files with those of the model.

    Transformers looks at shapes itself, but not in every version, not for layers that go to disk,
    and it goes on where ``ignore_mismatched_sizes=True``.

    Raises:
        RuntimeError: a shape differs.
    """
    expected = {name: shape for name, (_, shape) in _low_rank_tensors(model).items()}
    prefix = f"{model.base_model_prefix}."
    found = []
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                # A file may have been saved with a head and be loaded without, or the reverse.
                for name in (key, key.removeprefix(prefix), prefix + key):
                    if name in expected:
                        found.append((name, tuple(tensors.get_slice(key).get_shape())))
                        break
    _refuse_misshapen((name, shape, expected[name]) for name, shape in found)


def _refuse_misshapen(
    shapes: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise ``RuntimeError`` if, of (name, shape, expected shape), any two shapes differ."""
    wrong = [
        f"{name} is {list(shape)} and should be {list(expected)}"
        for name, shape, expected in shapes
        if shape != expected
    ]
    if wrong:
        raise RuntimeError(
            "The checkpoint has low-rank tensors in another shape than the ranks in config.json "
            f"say: {_listed(wrong)}."
        )


def _refuse_disordered(model: nn.Module) -> None:
    """Raise ``RuntimeError`` if the outputs of a pivoted layer are not each one of its rows."""
    wrong = [
        f"{name}.weight_order"
        for name, layer in low_rank_layers(model).items()
        if isinstance(layer, PivotedLinear)
        and not layer.weight_order.is_meta  # offloaded: not in memory
        and not is_order(layer.weight_order)
    ]
    if wrong:
        raise RuntimeError(
            f"The checkpoint has a weight_order that is not a permutation: {_listed(wrong)}."
        )


def _refuse_nonfinite(model: nn.Module) -> None:
    """Raise ``RuntimeError`` if a scale of integers is no number."""
    wrong = [
        f"{name}.{leaf}"
        for name, layer in replaced_layers(model).items()
        for leaf, tensor in layer.named_parameters(recurse=False)
        if leaf.endswith(SCALE)
        and not tensor.is_meta  # offloaded: not in memory
        and not bool(tensor.view(torch.float16).isfinite().all())
    ]
    if wrong:
        raise RuntimeError(f"The checkpoint has scales that are not finite: {_listed(wrong)}.")


def _refuse_missing(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise ``RuntimeError`` if a low-rank tensor was not in the checkpoint.

    Nor may anything else be missing, but the head of a class that is not the checkpoint's own (a
    classifier on top of a language model), which is new, as always in transformers.
    """
    own = type(model).__name__ in (model.config.architectures or ())
    required = own or _is_headless(model)
    body = f"{model.base_model_prefix}."
    tensors = _low_rank_tensors(model)
    lacking = sorted(k for k in missing if required or k.startswith(body) or k in tensors)
    if lacking:
        raise RuntimeError(
            f"The checkpoint lacks tensors of {type(model).__name__}: {_listed(lacking)}."
        )


def _refuse_extra(model: PreTrainedModel, config: HiSVDConfig, unexpected: Iterable[str]) -> None:
    """Raise ``RuntimeError`` if the checkpoint holds a low-rank tensor that has no place."""
    layers = replaced_layers(model)
    prefix = f"{model.base_model_prefix}."
    extra = []
    for key in sorted(unexpected):
        stem, _, leaf = key.rpartition(".")
        of_layer = stem in layers or stem.removeprefix(prefix) in layers
        # A rank without a layer is that of a head, which a model without a head leaves out.
        if of_layer or (leaf in _ADDED and stem not in {**config.ranks, **config.bits}):
            extra.append(key)
    if extra:
        raise RuntimeError(
            f"The checkpoint holds low-rank tensors for which the ranks in config.json leave no "
            f"place: {_listed(extra)}."
        )


def _names_our_code(config: PretrainedConfig) -> bool:
    """Tell whether ``auto_map`` names this file, in the folder or in a hub repository."""
    auto_map = getattr(config, "auto_map", None) or {}
    return str(auto_map.get(AUTO_CLASS, "")).split("--")[-1] == AUTO_MAP[AUTO_CLASS]


def _allow_casts(model: PreTrainedModel) -> None:
    """Let ``model.half()`` and ``model.float()`` cast as they do for dense models.

    Transformers refuses them for every quantization method. Here all numbers are plain, and what
    is not (codes, the bits of scales, orders) has integer types that a cast leaves alone.
    """
    for name in _CASTS:
        model.__dict__[name] = partial(getattr(nn.Module, name), model)


def _carry_code(model: PreTrainedModel) -> None:
    """Have ``model.save_pretrained`` write the ranks that the layers now have, and the code that
    ``auto_map`` names.

    Transformers keeps ``auto_map`` when it saves, and copies code only for classes that are
    remote code themselves, which the real model classes here are not.
    """
    # A partial, unlike a closure, is copied and pickled together with the model.
    model.__dict__["save_pretrained"] = partial(_save_with_code, model)


def _note_ranks(model: PreTrainedModel) -> None:
    """Put the ranks of the layers into the config: merged adapters raise them, or make a layer
    dense."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, HiSVDConfig):
        return
    layers, prefix = low_rank_layers(model), f"{model.base_model_prefix}."
    for name in list(config.ranks):
        layer = layers.get(name) or layers.get(name.removeprefix(prefix))
        if layer is None:
            del config.ranks[name]
        else:
            config.ranks[name] = layer.rank


def _save_with_code(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save as the model's class does, then add the code that loads the result."""
    _note_ranks(model)
    with_code = _names_our_code(model.config)
    if with_code:  # from now on the code is in the folder, and not in some hub repository
        model.config.auto_map = {**model.config.auto_map, **AUTO_MAP}
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    folder = Path(save_directory)
    # No config.json is written for a model with adapters, of which only the adapters are saved.
    if with_code and is_main_process and (folder / "config.json").is_file():
        for name, source in remote_code_files().items():
            shutil.copyfile(source, folder / name)


def _drop_code(model: PreTrainedModel) -> None:
    """Undo ``_carry_code``, for a model that is dense again."""
    for name in ("save_pretrained", *_CASTS):
        model.__dict__.pop(name, None)
    if _names_our_code(model.config):
        for auto_class in AUTO_MAP:
            model.config.auto_map.pop(auto_class, None)
        if not model.config.auto_map:
            del model.config.auto_map


register()
