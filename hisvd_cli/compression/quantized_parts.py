"""Quantizes and writes the parts of a checkpoint: each block, and the tensors outside blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # missing from its __all__

from hisvd_cli.calibration.calibrate import linears_of
from hisvd_cli.calibration.collector import Collector
from hisvd_cli.calibration.store import Sample
from hisvd_cli.compression.layout import block_number
from hisvd_cli.compression.rounded_sublayers import (
    by_sublayer,
    quantize_compensated,
    quantize_nearest,
    shapes_as_rounded,
)
from hisvd_cli.compression.rounding import Metric, metric_of
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.layers.lowrank import Storage
from hisvd_cli.modeling.layers.quantized import MATRICES, SCALE, quantized_shapes
from hisvd_cli.modeling.layers.shapes import numel
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model, build_stored_model, prepare
from hisvd_cli.modeling.structure.sublayers import find_sublayers
from hisvd_cli.modeling.structure.tensors import tensor_names
from hisvd_cli.utils.errors import NumericalError, SourceError, reason
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors, write_tensors
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["nearest", "gptq"]
_OUTSIDE = "outside"


@dataclass(frozen=True)
class Recipe:
    """Bits and method of quantization.

    Attributes:
        bits: name of a sublayer → 8 or 4; sublayers with 16, or not named, are not quantized.
        group_size: columns that share a scale at 4 bits.
        method: rounding method.
        damping: gptq: damping of the moment, relative to its mean diagonal.
    """

    bits: Mapping[str, int]
    group_size: int
    method: Method
    damping: float


@dataclass(frozen=True)
class Text:
    """Calibration text of gptq, and how to run the model."""

    sample: Sample
    device: torch.device
    dtype: torch.dtype
    batch: int


def _dense_bytes(checkpoint: Checkpoint, dense: PreTrainedModel) -> int:
    """Return the bytes of the model before compression, in the dtype of the checkpoint."""
    prefix, layers = decoder_blocks(dense)
    numbers = sum(
        prod(info.shape)
        for name, info in checkpoint.weights.infos.items()
        if name.rpartition(".")[0] not in checkpoint.ranks or name.endswith(".bias")
    )
    replaced = [s for s in find_sublayers(prefix, list(layers)) if s.name in checkpoint.ranks]
    width: int = getattr(torch, checkpoint.weights.dtype).itemsize
    return width * (numbers + sum(numel(s.shape) for s in replaced))


def _reads(weights: Weights, names: Mapping[str, str], quantized: Iterable[str]) -> dict[str, str]:
    """Return name in the quantized checkpoint → name to read.

    Names are those on disk, but quantized layers are named and oriented as in the model.
    """
    reads = {name: name for name in weights}
    for full in [f"{sublayer}.{leaf}" for sublayer in quantized for leaf in ("weight", "bias")]:
        read = names.get(full, full)
        if read != full:
            for stored in weights.derived[read].stored if read in weights.derived else (read,):
                reads.pop(stored, None)
            reads[full] = read
    return reads


class PartsWriter:
    """Builds and writes the parts of a quantized checkpoint.

    Attributes:
        stored: part → name → shape of each tensor.
        dense_bytes: bytes of the model before compression, in the current dtype of the weights.
    """

    def __init__(
        self, source: Source, checkpoint: Checkpoint, recipe: Recipe, text: Text | None
    ) -> None:
        self._weights = source.weights
        self._recipe = recipe
        self._text = text
        self._source = source
        self._storage = checkpoint.storage
        self._device = exact_device(text.device) if text else torch.device("cpu")
        dtype = text.dtype if text else torch.float32
        self._model = build_stored_model(source, dtype)
        self._prefix, layers = decoder_blocks(self._model)
        self.dense_bytes = _dense_bytes(checkpoint, build_meta_model(source, compressed=True))
        becoming = build_meta_model(source, dtype, compressed=True, working=False)
        _replace(becoming, checkpoint, recipe)
        prepare(becoming)
        _, self._integers = decoder_blocks(becoming)
        self._reads = _reads(self._weights, tensor_names(self._model, source), recipe.bits)
        self._shapes = {n: self._weights.info(read).shape for n, read in self._reads.items()}
        if missing := [n for n in recipe.bits if f"{n}.weight" not in self._shapes]:
            raise SourceError(f"{checkpoint.folder} lacks {missing[0]}.", "Compress again.")
        self._names: dict[str, list[str]] = {_OUTSIDE: []}
        self._names |= {self._block(index): [] for index in range(len(layers))}
        for name in self._shapes:
            self._names[self._part_of(name)].append(name)
        self.stored = {part: self._stored(names) for part, names in self._names.items()}

    def _block(self, index: int) -> str:
        return f"block-{index:05d}"

    def _part_of(self, name: str) -> str:
        inside = name.startswith(f"{self._prefix}.")
        index = name[len(self._prefix) + 1 :].partition(".")[0] if inside else ""
        return self._block(int(index)) if index.isdigit() else _OUTSIDE

    def _stored(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the quantized tensors of a part."""
        recipe = self._recipe
        stored: dict[str, tuple[int, ...]] = {}
        for sublayer, leaves in by_sublayer(names).items():
            shapes = {leaf: self._shapes[f"{sublayer}.{leaf}"] for leaf in leaves}
            if bits := recipe.bits.get(sublayer):
                shapes = shapes_as_rounded(shapes, bits, self._storage)
                shapes = quantized_shapes(shapes, bits, recipe.group_size)
            stored |= {f"{sublayer}.{leaf}": shape for leaf, shape in shapes.items()}
        return stored

    def sizes(self) -> dict[str, int]:
        """Return part → bytes."""
        return {
            part: sum(prod(shape) * self._width(name) for name, shape in tensors.items())
            for part, tensors in self.stored.items()
        }

    def _width(self, name: str) -> int:
        """Return the bytes per element of a written tensor."""
        sublayer, _, leaf = name.rpartition(".")
        if sublayer in self._recipe.bits and leaf in (*MATRICES, *(x + SCALE for x in MATRICES)):
            return 2 if leaf.endswith(SCALE) else 1
        return int(self._weights.info(self._reads[name]).width)

    def write_parts(self, home: Path, left: Sequence[str], reporter: Reporter) -> None:
        """Write the parts ``left``; the others are in ``home`` already."""
        walk = self._embedded() if self._text and left != [_OUTSIDE] else None
        with reporter.stage("Quantizing blocks", len(self.stored)) as step:
            for part in self.stored:
                path = home / f"{part}.part"
                if part in left:
                    moments = self._moments(walk, part) if walk and part != _OUTSIDE else {}
                    write_tensors(path, self._made(part, moments), {})
                if walk and part != _OUTSIDE:
                    self._pass_on(walk, part, path)
                step()

    def _made(self, part: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a part. Raises SourceError, NumericalError."""
        recipe = self._recipe
        made: dict[str, Tensor] = {}
        metric: Metric | None = None
        for sublayer, leaves in by_sublayer(self._names[part]).items():
            reads = {leaf: self._reads[f"{sublayer}.{leaf}"] for leaf in leaves}
            tensors = {leaf: self._weights.read(read) for leaf, read in reads.items()}
            if bits := recipe.bits.get(sublayer):
                kept = {"bias": tensors.pop("bias")} if "bias" in tensors else {}
                factors = {leaf: tensor.to(self._device) for leaf, tensor in tensors.items()}
                metric = self._metric(sublayer, moments, metric)
                tensors = kept | self._rounded(sublayer, factors, metric, bits)
            made |= {f"{sublayer}.{leaf}": tensor for leaf, tensor in tensors.items()}
        return made

    def _metric(
        self, sublayer: str, moments: Mapping[str, Tensor], last: Metric | None
    ) -> Metric | None:
        """Return the metric of a sublayer's input, reusing the last one for the same input; None
        without a moment."""
        moment = moments.get(sublayer)
        if moment is None:
            return None
        same = last is not None and last.moment is moment
        return last if same else metric_of(moment, self._recipe.damping)

    def _rounded(
        self, sublayer: str, factors: Mapping[str, Tensor], metric: Metric | None, bits: int
    ) -> dict[str, Tensor]:
        recipe = self._recipe
        try:
            if metric is None:
                return quantize_nearest(factors, bits, recipe.group_size)
            return quantize_compensated(factors, metric, bits, recipe.group_size, recipe.damping)
        except NumericalError as error:
            raise NumericalError(f"{sublayer}: {error.message}", error.hint) from error
        except LinAlgError as error:
            raise NumericalError(
                f"{sublayer} cannot be rounded: {reason(error)}",
                "Raise `quantize.damping`, or use `quantize.method` nearest.",
            ) from error

    def _embedded(self) -> BlockWalk:
        text = cast(Text, self._text)
        source, model = self._source, self._model
        walk = BlockWalk(source, text.device, text.dtype, text.batch, model=model)
        walk.embed(text.sample.tokens)
        return walk

    def _moments(self, walk: BlockWalk, part: str) -> dict[str, Tensor]:
        """Load a block, and return the second moments of the inputs of its sublayers."""
        index = block_number(part)
        walk.load(index)
        inside = f"{walk.prefix}.{index}."
        names = [name for name in self._recipe.bits if name.startswith(inside)]
        collector = Collector(linears_of(walk, names), walk.device, of_inputs=True)
        with collector.grouping() as groups:
            walk.probe(index)
        collector.choose_sides(groups)
        with collector.summing():
            walk.observe(index)
        means = {key: total.mean().to(self._device) for key, total in collector.sums.items()}
        return {name: means[key] for name, (key, _) in collector.owners.items()}

    def _pass_on(self, walk: BlockWalk, part: str, path: Path) -> None:
        """Run the hidden states through the quantized block."""
        index = block_number(part)
        tensors, _ = read_tensors(path, AGAIN)
        local = {
            name.removeprefix(f"{walk.prefix}.{index}."): tensor.to(
                walk.device, walk.dtype if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in tensors.items()
        }
        walk.layers[index] = self._integers[index]
        walk.layers[index].load_state_dict(local, strict=True, assign=True)
        walk.advance(index)
        walk.free(index)


def pair_storage(checkpoint: Checkpoint, recipe: Recipe) -> Storage:
    """Return the storage of the low-rank sublayers after quantization; 4 bits needs plain pairs, as
    stacks of experts are in any storage."""
    single = set(checkpoint.ranks).difference(factored_stacks(checkpoint))
    pairs = all(recipe.bits.get(name) == 4 for name in single)
    return "pair" if pairs else checkpoint.storage


def factored_stacks(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the low-rank stacks of experts, whose factors have three dimensions."""
    infos = checkpoint.weights.infos
    known = {
        name: [infos[leaf].shape for x in MATRICES if (leaf := f"{name}.{x}") in infos]
        for name in checkpoint.ranks
    }
    return [name for name, shapes in known.items() if any(len(shape) == 3 for shape in shapes)]


def _replace(model: PreTrainedModel, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Replace layers of a dense model on the meta device by quantized and low-rank ones."""
    from hisvd_cli.modeling.layers.transformers_plugin import (
        HiSVDConfig,
        format_version_of,
        replace_linears,
    )

    storage = pair_storage(checkpoint, recipe)
    version = format_version_of(storage, recipe.bits, checkpoint.experts)
    layout = (recipe.bits, recipe.group_size, checkpoint.experts)
    replace_linears(model, HiSVDConfig(checkpoint.ranks, version, storage, *layout))
