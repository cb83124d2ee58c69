"""Loads low-rank checkpoints with ``from_pretrained`` of transformers.

For transformers, ``hisvd`` is a quantization method named in ``config.json``: ``{"quant_method":
"hisvd", "format_version": 1, "ranks": {name: rank}}``. While the model is on the meta device, each
``nn.Linear`` X listed in ``ranks`` is replaced by a ``LowRankLinear`` with the tensors ``X.weight``
= V ``[r, n]``, ``X.weight_u`` = U ``[m, r]`` and ``X.bias`` ``[m]``, which transformers then loads
like any others. Version 2 adds ``"storage": "pivoted"``, for a ``PivotedLinear`` with ``X.weight``
``[r, n]``, ``X.weight_u`` ``[m − r, r]`` and ``X.weight_order`` ``[m]``. Version 3, with either
storage, adds ``"bits": {name: 8 or 4}`` and ``"group_size"`` for quantized low-rank or dense
layers; ``quantized`` describes their tensors. Version 4, with or without these, adds ``"experts":
"separate"``, ``"shared-v"`` or ``"shared-u"``: some names in ``ranks`` are stacked parameters of
mixtures of experts, X ``[E, m, n]`` or transposed ``[E, n, m]``, replaced by ``LowRankExperts``
with ``X.weight`` = V ``[E, r, n]`` and ``X.weight_u`` = U ``[E, m, r]``, or ``[r, n]`` or
``[m, r]`` for the shared one. A low-rank ``Conv1D`` of transformers is stored like an
``nn.Linear``.

Importing this file registers the method. The file is also copied into checkpoints as
``modeling_hisvd.py``, for ``trust_remote_code=True`` without hisvd. It therefore only imports files
that are copied too, and raises plain ``ValueError`` (invalid ``config.json``) and ``RuntimeError``
(invalid tensors). It supports transformers 4.57 and 5; stacks of experts need 5.

The file exceeds the usual length limit, because the names of the copied files are part of the
checkpoint format.
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

from .conversions import excepted, saved_as_named, with_and_without
from .experts import EXPERT_LAYOUTS, ExpertLayout, ExpertStack, LowRankExperts
from .factored import Factored  # noqa: F401 (4.57 only copies files imported here)
from .import_hooks import when_imported  # noqa: F401
from .lowrank import FACTORS, LowRankLinear, PivotedLinear, Storage, is_order
from .peft_support import support_adapters
from .quantized import BITS, MATRICES, SCALE, QuantizedLinear
from .replacement import (
    Replaced,
    dense_form,
    find_dense,
    low_rank_stack,
    replacement,
    set_layer,
    sizes_of,
)

if TYPE_CHECKING:  # at run time, transformers may still be importing these
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

QUANT_METHOD = "hisvd"
FORMAT_VERSIONS = {"pair": 1, "pivoted": 2}
QUANTIZED_VERSION = 3
EXPERTS_VERSION = 4
GROUP_SIZE = 64
MODELING_FILE = "modeling_hisvd.py"
AUTO_CLASS = "AutoModelForCausalLM"
IMAGE_TEXT_CLASS = "AutoModelForImageTextToText"
ENTRY_POINTS = {
    AUTO_CLASS: "modeling_hisvd.HiSVDForCausalLM",
    IMAGE_TEXT_CLASS: "modeling_hisvd.HiSVDForImageTextToText",
    "AutoConfig": "modeling_hisvd.HiSVDAutoConfig",
}

_LARGEST = (1 << 31) - 1  # upper bound for ranks and group sizes
_ADDED = {leaf for leaves in FACTORS.values() for leaf in leaves} - {"weight"}
_ADDED |= {leaf + SCALE for leaf in MATRICES}

_CASTS = ("half", "float")

# The method in which transformers finalizes the lists of missing and unexpected keys.
_REPORT_METHOD = "_adjust_missing_and_unexpected_keys"


class HiSVDConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a low-rank checkpoint.

    Args:
        ranks: module name → rank of each low-rank layer.
        format_version: version of the layout: 1 for the storage pair, 2 for pivoted, 3 for either
            with bits, 4 for any with stacks of experts.
        storage: how factors are stored.
        bits: module name → 8 or 4 for each quantized layer.
        group_size: columns per scale with 4 bits.
        experts: layout of the stacks of experts; None if there are none.
        kwargs: other keys of ``config.json``; ignored.

    Raises:
        ValueError: unknown format version, storage or layout of experts, or invalid ranks, bits or
            group size.
    """

    quant_method: Any  # a plain string, because transformers' enum only has its own methods

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        format_version: int = 1,
        storage: str = "pair",
        bits: Mapping[str, int] | None = None,
        group_size: int = GROUP_SIZE,
        experts: str | None = None,
        **kwargs: Any,  # noqa: ARG002 (contains ``quant_method``)
    ) -> None:
        known = isinstance(storage, str) and storage in FORMAT_VERSIONS
        known = known and experts in (None, *EXPERT_LAYOUTS)
        if not known or format_version != format_version_of(storage, bits, experts):
            raise ValueError(
                f"This checkpoint has hisvd format version {format_version!r}, storage {storage!r} "
                f"and experts {experts!r}, but this code supports version 1 (pair), 2 (pivoted), "
                f"3 (either, quantized) and 4 (with experts {', '.join(EXPERT_LAYOUTS)}). Use "
                "another version of hisvd."
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.ranks = _checked("ranks", ranks, "positive integers", _is_positive)
        self.storage = cast(Storage, storage)
        self.bits = _checked("bits", bits, "4 or 8", _is_width)
        if not _is_positive(group_size):
            raise ValueError(
                f"quantization_config.group_size is not a positive integer: {group_size}"
            )
        self.group_size = group_size
        self.experts = cast(ExpertLayout | None, experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the content for ``config.json``, without default values."""
        document: dict[str, Any] = super().to_dict()
        if self.storage == "pair":
            document.pop("storage")
        if not self.bits:
            del document["bits"], document["group_size"]
        if self.experts is None:
            del document["experts"]
        return document


class HiSVDQuantizer(HfQuantizer):
    """Replaces layers before the weights are loaded, and checks them afterwards.

    A missing or extra low-rank tensor, or one of the wrong shape, raises ``RuntimeError``;
    transformers itself would only warn and continue with random values.
    """

    requires_calibration = True  # dense checkpoints cannot be converted while loading
    quantization_config: HiSVDConfig

    def __init__(self, quantization_config: HiSVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._report_seen = False
        self._names: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replace the layers of a model on the meta device, and hook into the loading report."""
        replace_linears(model, self.quantization_config)
        self._names = with_and_without(model.base_model_prefix, _low_rank_tensors(model))
        files = kwargs.get("checkpoint_files")  # transformers 5 only
        _check_file_shapes(model, files or ())
        self._watch_report(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Exclude low-rank tensors from the rules by which transformers 5 converts tensors."""
        inherited: Any = super().update_weight_conversions
        rules = inherited(weight_conversions, *args)
        return [excepted(rule, self._names) for rule in rules]

    def _watch_report(self, model: PreTrainedModel) -> None:
        """Check the loading report of this model.

        Transformers does not pass the report to quantizers, so the method of this model instance
        that produces it is wrapped. If a future version does not call it, loading raises an error.
        """
        original = getattr(model, _REPORT_METHOD)

        def checked(*args: Any, **kwargs: Any) -> Any:
            delattr(model, _REPORT_METHOD)  # adapters loaded later are not checked
            result = original(*args, **kwargs)
            # 5.3 and later modify a report in place; earlier versions return two lists of keys.
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
        """Reject checkpoints with low-rank tensors that will not be loaded (transformers 4 only).

        Called once with all keys of the checkpoint, and again without those that
        ``ignore_mismatched_sizes=True`` skips.
        """
        present = set(loaded_keys)
        absent = sorted(name for name in _low_rank_tensors(model) if name not in present)
        if absent:
            raise RuntimeError(
                "The checkpoint lacks low-rank tensors, or their shapes do not match the ranks in "
                f"config.json: {_listed(absent)}."
            )
        return expected_keys

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,  # noqa: ARG002 (transformers 4 passes the config)
    ) -> PreTrainedModel:
        """Check the loaded layers, and extend ``save_pretrained`` to save the loader code."""
        if not self._report_seen:
            raise RuntimeError(
                "This version of transformers is not supported: hisvd could not check that every "
                "low-rank tensor was loaded."
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
        """Convert to a dense model, for ``model.dequantize()``.

        Transformers 5 passes a dtype: that of the caller or of the model's config, which is a
        string after the model was saved.

        Raises:
            ValueError: some layers are offloaded, so that their tensors are not in memory.
        """
        layers = replaced_layers(model)
        absent = [name for name, layer in layers.items() if layer.weight.is_meta]
        if absent:
            raise ValueError(
                f"Cannot dequantize layers that are offloaded: {_listed(absent)}. Load the model "
                "with a device_map that keeps them in memory."
            )
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if dtype is None and self.quantization_config.bits:  # codes have no floating-point dtype
            dtype = model.dtype
        for name, layer in layers.items():
            set_layer(model, name, dense_form(layer, dtype))
        if dtype is not None and dtype != model.dtype:
            nn.Module.to(model, dtype)  # all layers: mixed dtypes would not run
        _drop_code(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:  # noqa: ARG002
        """Low-rank models can be saved, because they consist of plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Low-rank models can be trained; quantized ones cannot."""
        return not self.quantization_config.bits

    @property
    def is_qat_trainable(self) -> bool:
        """Same as ``is_trainable``; otherwise the Trainer requires adapters."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """Low-rank models support ``torch.compile``."""
        return True


class HiSVDForCausalLM:
    """Entry point in ``auto_map``, which delegates to the model's own class.

    Not a model class: ``from_pretrained`` returns the checkpoint's architecture, such as
    ``LlamaForCausalLM``. Architectures defined by remote code are not supported.
    """

    auto_class = AUTO_CLASS

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a low-rank checkpoint; arguments as for ``from_pretrained`` of the auto class."""
        kwargs["trust_remote_code"] = False  # this call is the remote code
        model: PreTrainedModel = cls._auto().from_pretrained(path, *args, **kwargs)
        return model

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Build a model with random weights in the checkpoint's low-rank structure."""
        kwargs["trust_remote_code"] = False
        model: PreTrainedModel = cls._auto().from_config(config, **kwargs)
        replace_linears(model, HiSVDConfig(**dict(config.quantization_config)))
        _carry_code(model)
        return model

    @classmethod
    def _auto(cls) -> Any:
        import transformers

        return getattr(transformers, cls.auto_class)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = AUTO_CLASS) -> None:
        """Do nothing; transformers calls this to have the file of a class saved with the model."""


class HiSVDForImageTextToText(HiSVDForCausalLM):
    """The entry point for models that also take images."""

    auto_class = IMAGE_TEXT_CLASS


class HiSVDAutoConfig:
    """Entry point in ``auto_map`` for the config, which delegates to the model's own class.

    Programs such as lm-eval read ``quantization_config`` before they load a model; importing this
    file at that point registers the quantizer.
    """

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Any:
        """Load the config; arguments and result as for ``AutoConfig.from_pretrained``."""
        from transformers import AutoConfig

        kwargs["trust_remote_code"] = False  # this call is the remote code
        return AutoConfig.from_pretrained(path, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, as :class:`HiSVDForCausalLM` does."""


def remote_code_files() -> dict[str, Path]:
    """Return file name in a checkpoint → path of the source, for the loader code."""
    here = Path(__file__)
    names = (
        *("lowrank.py", "quantized.py", "peft_support.py", "import_hooks.py"),
        *("factored.py", "experts.py", "replacement.py", "conversions.py"),
    )
    inner = {name: here.with_name(name) for name in names}
    return {MODELING_FILE: here, **inner}


def auto_map(auto_class: str = AUTO_CLASS) -> dict[str, str]:
    """Return the ``auto_map`` of ``config.json``.

    Args:
        auto_class: the auto class that loads the model.
    """
    return {name: ENTRY_POINTS[name] for name in (auto_class, "AutoConfig")}


AUTO_MAP = auto_map()


def format_version_of(
    storage: str, bits: Mapping[str, int] | None, experts: str | None = None
) -> int:
    """Return the format version of a layout."""
    if experts is not None:
        return EXPERTS_VERSION
    return QUANTIZED_VERSION if bits else FORMAT_VERSIONS[storage]


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return name → low-rank layer of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def replaced_layers(model: nn.Module) -> dict[str, Replaced]:
    """Return name → layer for all low-rank and quantized layers and stacks of a model."""
    kinds = (LowRankLinear, QuantizedLinear, LowRankExperts)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def replace_linears(model: PreTrainedModel, config: HiSVDConfig) -> None:
    """Replace dense layers by low-rank and quantized ones with uninitialized or random values.

    Args:
        model: a model, on the meta device or not. For a model without a head (``AutoModel``), the
            names of the full model are used, and those of the head are ignored.
        config: the layers to replace.

    Raises:
        ValueError: a name is not a linear layer or a stack of experts of the model, its rank is too
            large, or the layout of the experts is missing, superfluous or not supported.
    """
    if config.experts:
        _require_stacks()
    prefix = f"{model.base_model_prefix}."
    headless = _is_headless(model)
    wrong = []
    stacks = False
    for name in {**config.ranks, **config.bits}:
        local = name
        dense = find_dense(model, name)
        if dense is None and headless:
            local = name.removeprefix(prefix)
            dense = find_dense(model, local)
        if dense is not None:
            stacks |= isinstance(dense, ExpertStack)
            set_layer(model, local, _replacement(dense, name, config))
        elif not headless or name.startswith(prefix):
            wrong.append(name)
    if wrong:
        raise ValueError(
            "quantization_config names layers that are neither linear nor stacks of experts in "
            f"{type(model).__name__}: {_listed(wrong)}."
        )
    if config.experts and not stacks:
        raise ValueError(
            f"quantization_config.experts is {config.experts!r}, but no name in "
            "quantization_config.ranks is a stack of experts."
        )


def _require_stacks() -> None:
    """Raise ``ValueError`` if the installed transformers is too old for stacks of experts."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            "This checkpoint has low-rank experts, which transformers "
            f"{transformers.__version__} does not support. Install transformers 5."
        )


def register() -> None:
    """Register the method with transformers; the first registration in a process is kept.

    Several copies of this file may be loaded in one process: the installed one, and one per
    checkpoint that is loaded with ``trust_remote_code=True``.
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
    key: str, values: object, expected: str, is_valid: Callable[[object], bool]
) -> dict[str, int]:
    """Return a mapping of ``quantization_config``, empty for None. Raises ``ValueError``."""
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config.{key} must map names to integers: {values!r}.")
    wrong = [f"{name}: {value!r}" for name, value in values.items() if not is_valid(value)]
    if wrong:
        raise ValueError(f"quantization_config.{key} must be {expected}: {_listed(wrong)}.")
    return dict(values)


def _listed(items: Iterable[str], limit: int = 5) -> str:
    """Join the first items, and state how many follow."""
    shown = list(items)
    rest = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + rest


def _is_headless(model: PreTrainedModel) -> bool:
    """Return whether this is a model without a head, as returned by ``AutoModel``."""
    prefix = model.base_model_prefix
    return bool(prefix) and not hasattr(model, prefix)


def _replacement(
    dense: nn.Linear | Conv1D | ExpertStack, name: str, config: HiSVDConfig
) -> nn.Module:
    """Return the layer that replaces a dense one. Raises ``ValueError``."""
    rank, largest = config.ranks.get(name), min(sizes_of(dense))
    if rank is not None and rank > largest:
        raise ValueError(
            f"quantization_config.ranks: the rank {rank} of {name} exceeds its maximum, {largest}."
        )
    bits = config.bits.get(name)
    if not isinstance(dense, ExpertStack):
        return replacement(dense, rank, config.storage, bits, config.group_size)
    if rank is None or bits is not None:
        raise ValueError(f"quantization_config.bits: {name} is a stack of experts.")
    if config.experts is None:
        raise ValueError(
            f"quantization_config lacks experts, although {name} is a stack of experts."
        )
    return low_rank_stack(dense, name, rank, config.experts)


def _low_rank_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """Return name → (tensor, expected shape) for all replaced layers."""
    tensors: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
    for name, layer in replaced_layers(model).items():
        for leaf, shape in layer.stored_shapes().items():
            tensors[f"{name}.{leaf}"] = getattr(layer, leaf), shape
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias, (layer.out_features,)
    return tensors


def _check_file_shapes(model: PreTrainedModel, files: Iterable[str]) -> None:
    """Compare the shapes of low-rank tensors in safetensors files with those of the model.

    Transformers does not check shapes in every version, nor for layers that are offloaded to disk,
    nor with ``ignore_mismatched_sizes=True``.

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
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                # The model may have been saved with a head and be loaded without, or vice versa.
                for name in (key, key.removeprefix(prefix), prefix + key):
                    if name in expected:
                        found.append((name, tuple(tensors.get_slice(key).get_shape())))
                        break
    _refuse_misshapen((name, shape, expected[name]) for name, shape in found)


def _refuse_misshapen(
    shapes: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise ``RuntimeError`` if any shape of (name, shape, expected shape) is wrong."""
    wrong = [
        f"{name} is {list(shape)} and should be {list(expected)}"
        for name, shape, expected in shapes
        if shape != expected
    ]
    if wrong:
        raise RuntimeError(
            "The checkpoint has low-rank tensors whose shapes do not match the ranks in "
            f"config.json: {_listed(wrong)}."
        )


def _refuse_disordered(model: nn.Module) -> None:
    """Raise ``RuntimeError`` if the order of a pivoted layer is not a permutation."""
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
    """Raise ``RuntimeError`` if a quantization scale is not finite."""
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
    """Raise ``RuntimeError`` if a tensor is missing in the checkpoint.

    Only the head of another model class than the checkpoint's may be missing, such as a classifier
    on top of a language model.
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
    """Raise ``RuntimeError`` if the checkpoint contains low-rank tensors that no layer uses."""
    layers = replaced_layers(model)
    prefix = f"{model.base_model_prefix}."
    extra = []
    for key in sorted(unexpected):
        stem, _, leaf = key.rpartition(".")
        of_layer = stem in layers or stem.removeprefix(prefix) in layers
        # A rank without a layer belongs to the head, which a model without a head lacks.
        if of_layer or (leaf in _ADDED and stem not in {**config.ranks, **config.bits}):
            extra.append(key)
    if extra:
        raise RuntimeError(
            "The checkpoint contains low-rank tensors that do not match the ranks in config.json: "
            f"{_listed(extra)}."
        )


def _our_entries(config: PretrainedConfig) -> dict[str, str]:
    """Return the entries of ``auto_map`` for this file, if it names the file: empty if not.

    It may name the file in the folder or in a Hub repository.
    """
    stated = getattr(config, "auto_map", None) or {}
    own = {
        name: entry
        for name, entry in ENTRY_POINTS.items()
        if str(stated.get(name, "")).split("--")[-1] == entry
    }
    model_class = next((name for name in own if name != "AutoConfig"), None)
    return {**auto_map(model_class), **own} if model_class else {}


def _allow_casts(model: PreTrainedModel) -> None:
    """Enable ``model.half()`` and ``model.float()``, as for dense models.

    Transformers disables them for every quantization method. Here, tensors are either plain
    floating-point ones or have integer types, which casts do not change.
    """
    for name in _CASTS:
        model.__dict__[name] = partial(getattr(nn.Module, name), model)


def _carry_code(model: PreTrainedModel) -> None:
    """Extend ``model.save_pretrained`` to write the current ranks and the loader code.

    Transformers keeps ``auto_map`` when it saves a model, but only copies code for classes that
    are defined by remote code, which the model classes here are not.
    """
    # A partial, unlike a closure, can be copied and pickled with the model.
    model.__dict__["save_pretrained"] = partial(_save_with_code, model)


def _note_ranks(model: PreTrainedModel) -> None:
    """Write the current ranks into the config; merging adapters raises ranks or makes layers
    dense."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, HiSVDConfig):
        return
    layers, prefix = replaced_layers(model), f"{model.base_model_prefix}."
    for name in list(config.ranks):
        layer = layers.get(name) or layers.get(name.removeprefix(prefix))
        if isinstance(layer, LowRankLinear | LowRankExperts):
            config.ranks[name] = layer.rank
        else:
            del config.ranks[name]


def _save_with_code(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save the model with the method of its class, then add the loader code."""
    _note_ranks(model)
    entries = _our_entries(model.config)
    if entries:  # the code is in the saved folder now, not in a Hub repository
        model.config.auto_map = {**model.config.auto_map, **entries}
    with saved_as_named(model, _low_rank_tensors(model)):
        type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    folder = Path(save_directory)
    # For a model with adapters, only the adapters are saved, without a config.json.
    if entries and is_main_process and (folder / "config.json").is_file():
        for name, source in remote_code_files().items():
            shutil.copyfile(source, folder / name)


def _drop_code(model: PreTrainedModel) -> None:
    """Undo ``_carry_code`` and ``_allow_casts``, for a dequantized model."""
    for name in ("save_pretrained", *_CASTS):
        model.__dict__.pop(name, None)
    if entries := _our_entries(model.config):
        for auto_class in entries:
            model.config.auto_map.pop(auto_class, None)
        if not model.config.auto_map:
            del model.config.auto_map


register()
