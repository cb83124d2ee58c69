"""Presents quantized weights on disk as plain weights.

Each tensor is dequantized when it is read, so that only one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.sources.quantized_input import (
    OWN,
    check_config,
    check_names,
    config_says,
    refusal,
)
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = ("weight_scale_inv", "weight_scale")
_PARTS = (
    *(*_SCALES, "weight_zero_point", "weight_shape", "weight_packed", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "activation_scale", "input_scale_ub"),
    *("input_global_scale", "k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale"),
)
"""Suffixes of auxiliary tensors of quantized layers."""


@dataclass(frozen=True)
class _Made:
    """A weight that is computed from stored tensors.

    Attributes:
        kind: name of the format.
        shape: shape of the weight.
        stored: name of the tensor that contains the values.
        make: reads and dequantizes it.
    """

    kind: str
    shape: tuple[int, ...]
    stored: str
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class _Reader:
    """Finds the quantized weights of a folder.

    Attributes:
        name: the model as named by the user.
        folder: its folder.
        raw: the tensors on disk.
        said: quantization settings in config.json.
        dtype: dtype of the plain weights.
    """

    name: str
    folder: Path
    raw: Weights
    said: Mapping[str, Any]
    dtype: str

    def find(self) -> dict[str, _Made]:
        """Return name → how to compute it, for each weight that is not stored in plain form.

        Raises:
            UnsupportedModelError: the format is not supported.
            SourceError: a tensor is missing or inconsistent.
        """
        made = {}
        for name, info in self.raw.infos.items():
            base, _, leaf = name.rpartition(".")
            if leaf == "weight_packed":
                made[f"{base}.weight"] = self._packed(base)
            elif name.endswith("_blocks") and f"{name[:-7]}_scales" in self.raw:
                made[name[:-7]] = self._microscaled(name[:-7])
            elif leaf == "weight" and info.dtype == "int8":
                made[name] = self._scaled(base, "int8")
            elif info.dtype.startswith(("float8", "F8_")) and leaf not in _PARTS:
                made[name] = self._float8(name, base, leaf)
        return made

    def _float8(self, name: str, base: str, leaf: str) -> _Made:
        if leaf == "weight" and any(f"{base}.{scale}" in self.raw for scale in _SCALES):
            return self._scaled(base, "float8")
        if self.said:
            raise SourceError(
                f"{self.name} lacks the scale of {name}, an 8-bit tensor.",
                "The checkpoint is incomplete: download it again.",
            )

        def cast() -> Tensor:
            return self.raw.read(name).to(self._torch_dtype())

        return _Made("float8 without scales", self.raw.infos[name].shape, name, cast)

    def _scaled(self, base: str, kind: str) -> _Made:
        from hisvd_cli.modeling.sources.dequantize import scaled

        weight, zeros = f"{base}.weight", f"{base}.weight_zero_point"
        scale = next((f"{base}.{s}" for s in _SCALES if f"{base}.{s}" in self.raw), "")
        if not scale:
            raise refusal(self.name, self.folder, "int8", f"tensor {weight} without a scale")

        def make() -> Tensor:
            zero_point = self.raw.read(zeros) if zeros in self.raw else None
            stored, factors = self.raw.read(weight), self.raw.read(scale)
            return scaled(stored, factors, self._torch_dtype(), zero_point, self._block())

        return _Made(kind, self.raw.infos[weight].shape, weight, make)

    def _packed(self, base: str) -> _Made:
        from hisvd_cli.modeling.sources.dequantize import scaled, unpacked

        names = {part: f"{base}.weight_{part}" for part in ("packed", "scale", "shape")}
        info = self.raw.infos[names["packed"]]
        if info.dtype != "int32" or len(info.shape) != 2:
            detail = f"tensor {names['packed']} {list(info.shape)} of {info.dtype}"
            raise refusal(self.name, self.folder, "compressed-tensors", detail)
        if lost := [name for name in names.values() if name not in self.raw]:
            raise SourceError(
                f"{self.name} lacks {lost[0]}, which {names['packed']} requires.",
                "The checkpoint is incomplete: download it again.",
            )
        height, width = self._checked_shape(names["shape"], names["packed"])
        bits = self._bits(names["packed"], width)

        def make() -> Tensor:
            values = unpacked(self.raw.read(names["packed"]), bits, width)
            scale, zero_point, groups = self.raw.read(names["scale"]), None, None
            if f"{base}.weight_zero_point" in self.raw:
                # Zero points are packed along the rows, 32 // bits per word.
                words = self.raw.read(f"{base}.weight_zero_point").T
                zero_point = unpacked(words.contiguous(), bits, height).T
            if f"{base}.weight_g_idx" in self.raw:
                groups = self.raw.read(f"{base}.weight_g_idx")
            return scaled(values, scale, self._torch_dtype(), zero_point, None, groups)

        return _Made(f"packed {bits}-bit integers", (height, width), names["packed"], make)

    def _checked_shape(self, shape_name: str, packed: str) -> tuple[int, int]:
        shape, rows = self.raw.read(shape_name).flatten().tolist(), self.raw.infos[packed].shape
        if len(shape) != 2 or shape[0] != rows[0] or shape[1] < 1:
            raise SourceError(
                f"{shape_name} is {shape}, which does not match {packed} {list(rows)}.",
                "The file is damaged: download it again.",
            )
        return int(shape[0]), int(shape[1])

    def _bits(self, packed: str, width: int) -> int:
        """Return the bits per value: those of the config if they match the tensor, else the most
        that match. Raises UnsupportedModelError."""
        words = self.raw.infos[packed].shape[1]
        groups = self.said.get("config_groups")
        named = [
            weights.get("num_bits")
            for group in (groups.values() if isinstance(groups, dict) else [])
            if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict)
        ]
        # With other bit widths, values may cross word boundaries, depending on the version.
        fitting = [bits for bits in (8, 4, 2, 1) if -(-width * bits // 32) == words]
        for bits in (*named, *fitting):
            if bits in fitting:
                return int(bits)
        detail = f"tensor {packed} of {' or '.join(map(str, named)) or 'unknown'} bits"
        raise refusal(self.name, self.folder, "compressed-tensors", detail)

    def _microscaled(self, base: str) -> _Made:
        from hisvd_cli.modeling.sources.dequantize import microscaled

        blocks, scales = f"{base}_blocks", f"{base}_scales"
        shape = self.raw.infos[blocks].shape
        if len(shape) != 4:
            raise refusal(self.name, self.folder, "MXFP4", f"tensor {blocks} {list(shape)}")

        def make() -> Tensor:
            return microscaled(self.raw.read(blocks), self.raw.read(scales), self._torch_dtype())

        return _Made("MXFP4", (shape[0], shape[2] * shape[3] * 2, shape[1]), blocks, make)

    def _block(self) -> tuple[int, int] | None:
        """Return the rectangle that shares a scale, if the config specifies it."""
        groups = self.said.get("config_groups")
        inner = [
            weights.get("block_structure")
            for group in (groups.values() if isinstance(groups, dict) else [])
            if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict)
        ]
        for said in (self.said.get("weight_block_size"), *inner):
            if isinstance(said, list) and len(said) == 2 and all(type(n) is int for n in said):
                return (said[0], said[1])
        return None

    def _torch_dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype)


def dequantized(
    name: str, folder: Path, config: Mapping[str, Any], raw: Weights
) -> tuple[Weights, list[str]]:
    """Return the plain weights, and notes on what is dequantized.

    Args:
        name: the model as named by the user.
        folder: its folder.
        config: the parsed config.json.
        raw: the tensors on disk.

    Raises:
        UnsupportedModelError: the format is not supported.
        SourceError: a tensor is missing or inconsistent.
    """
    method, said = config_says(config)
    if method == OWN:
        return raw, []
    check_config(name, folder, config)
    check_names(name, folder, raw.infos)
    dtype = plain_dtype(config, raw)
    made = _Reader(name, folder, raw, said, dtype).find()
    if not made:
        return raw, []
    infos, where, recipes = dict(raw.infos), dict(raw.where), dict(raw.recipes)
    for stored in [each for each in infos if _is_part(each, made)]:
        del infos[stored], where[stored]
    for weight, one in made.items():
        nbytes = prod(one.shape) * _width(dtype)
        infos[weight] = TensorInfo(dtype, one.shape, 0, nbytes)
        where[weight] = raw.where[one.stored]
        recipes[weight] = partial(_fitting, one, weight, name)
    kinds = sorted({one.kind for one in made.values()})
    note = f"{len(made)} weights of {name} ({', '.join(kinds)}) are dequantized to {dtype}."
    view = replace(raw, infos=infos, where=where, recipes=recipes, parts=tuple(raw.files))
    return view, [note]


def _is_part(name: str, made: Mapping[str, _Made]) -> bool:
    """Return whether a tensor is only used for dequantization or belongs to activations."""
    if name.endswith(("_blocks", "_scales")):
        return name[:-7] in made
    return name.endswith(tuple(f".{part}" for part in _PARTS))


def _fitting(one: _Made, weight: str, name: str) -> Tensor:
    try:
        return one.make()
    except ValueError as error:
        raise SourceError(
            f"{weight} of {name} cannot be dequantized: {error}.",
            "The file is damaged or of another format: download it again.",
        ) from error


def plain_dtype(config: Mapping[str, Any], raw: Weights) -> str:
    """Return the dtype for dequantized weights: that of the config, else that of most unquantized
    tensors, else bfloat16."""
    text = config.get("text_config")
    for document in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if document.get(key) in ("float32", "bfloat16", "float16"):
                return str(document[key])
    sizes: dict[str, int] = {}
    for name, info in raw.infos.items():
        if info.dtype in ("float32", "bfloat16", "float16") and not name.endswith(_PARTS):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="bfloat16")


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
