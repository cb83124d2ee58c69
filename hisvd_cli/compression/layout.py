"""The tensors of a compressed checkpoint, and the parts in which they are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from hisvd_cli.allocation.estimate import decomposition_cost
from hisvd_cli.modeling.layers.lowrank import FACTORS, Storage, factor_shapes
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.naming import Naming, find_naming
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers
from hisvd_cli.modeling.structure.tensors import own_head, tensor_names
from hisvd_cli.utils.distributed import World, share_by_cost

if TYPE_CHECKING:
    from hisvd_cli.modeling.sources.source import Source
    from hisvd_cli.modeling.sources.weights import Weights

OUTSIDE = "outside"
_INDEX_BYTES = 4


@dataclass(frozen=True)
class Factored:
    """A sublayer that is factored.

    Attributes:
        name: the sublayer in the model. Its factors have that name in the checkpoint too, which
            the loader excludes from the renamings of transformers.
        weights: linear module in the working model → name of its weight to read; one per expert of
            a stack.
        stacked: whether it is a stack of experts.
    """

    name: str
    weights: Mapping[str, str]
    stacked: bool = False

    def tensors(self, storage: Storage) -> list[str]:
        """Return the names of its factors in the checkpoint."""
        leaves = FACTORS["pair" if self.stacked else storage]
        return [f"{self.name}.{leaf}" for leaf in leaves]


@dataclass
class Part:
    """Tensors of a checkpoint that are written together.

    Attributes:
        copied: name in the checkpoint → name to read, for unchanged tensors.
        factored: the sublayer, for a part that consists of factors.
        bytes: size of all tensors.
        cost: of factoring; 0 for unchanged tensors.
    """

    copied: dict[str, str] = field(default_factory=dict)
    factored: Factored | None = None
    bytes: int = 0
    cost: int = 0

    def names(self, storage: Storage) -> list[str]:
        """Return the names of its tensors in the checkpoint."""
        return [*self.copied, *(self.factored.tensors(storage) if self.factored else ())]


@dataclass(frozen=True)
class Layout:
    """The tensors of a checkpoint, and the part in which each is written.

    Attributes:
        architecture: class name of the model.
        parts: parts are written and resumed one by one: the tensors outside blocks, the unchanged
            tensors of each block, and each factored sublayer.
        own_head: whether the output head is written although the config ties it.
        stacked: whether a factored sublayer is a stack of experts.
    """

    architecture: str
    parts: dict[str, Part]
    own_head: bool

    def shared(self, left: Sequence[str], here: World) -> list[str]:
        """Return those of the remaining parts that this process builds."""
        blocks: dict[str, list[tuple[str, int]]] = {}
        for part in left:
            blocks.setdefault(block_of(part), []).append((part, self.parts[part].cost))
        owner = share_by_cost(list(blocks.values()), here.size)
        return [part for part in left if owner[part] == here.rank]

    def factored(self) -> dict[str, str]:
        """Return sublayer → part of all factored sublayers but stacks, in order."""
        return {
            part.factored.name: name
            for name, part in self.parts.items()
            if part.factored and not part.factored.stacked
        }

    @property
    def stacked(self) -> bool:
        """Whether a stack of experts is factored."""
        return any(part.factored and part.factored.stacked for part in self.parts.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Part → bytes."""
        return {name: part.bytes for name, part in self.parts.items()}


def block_of(part: str) -> str:
    """Return the part of the unchanged tensors in the same block, such as ``block-00003``."""
    return part.partition(".")[0]


def block_number(part: str) -> int:
    """Return the block index of a part inside a block."""
    return int(block_of(part).rpartition("-")[2])


def lay_out(source: Source, ranks: Mapping[str, int], storage: Storage) -> Layout:
    """Return all tensors of the checkpoint and their sizes."""
    model = build_meta_model(source)
    prefix, layers = decoder_blocks(model)
    names, naming = tensor_names(model, source), find_naming(model, source)
    chosen = [s for s in find_sublayers(prefix, list(layers)) if s.name in ranks]
    owner = {f"{member}.weight": s for s in chosen for member in s.members}
    changed = {n for name in owner for n in _stored(source.weights, names[name])}
    parts: dict[str, Part] = {OUTSIDE: Part()}
    parts |= {f"block-{i:05d}": Part() for i in range(len(layers))}
    groups: dict[str, list[str]] = defaultdict(list)
    done: set[str] = set()
    for name in names:
        block = _block(name, prefix)
        if sublayer := owner.get(name):
            part = f"{block}.{sublayer.name[len(prefix) + 1 :].partition('.')[2]}"
            if part not in parts:
                factored = _factored(sublayer, names)
                parts[part] = _factors(factored, sublayer, ranks[sublayer.name], storage, source)
                groups[block].append(part)
            continue
        for written, stored in _copied(source.weights, name, names[name], changed, naming):
            if stored not in done:
                done.add(stored)
                parts[block].copied[written] = stored
                parts[block].bytes += source.weights.info(stored).nbytes
    return Layout(type(model).__name__, dict(_ordered(parts, groups)), own_head(model, names))


def _ordered(
    parts: Mapping[str, Part], groups: Mapping[str, list[str]]
) -> Iterator[tuple[str, Part]]:
    """Yield the parts in forward order, without empty ones."""
    for block in [name for name in parts if "." not in name]:
        for name in (block, *groups.get(block, ())):
            if parts[name].copied or parts[name].factored:
                yield name, parts[name]


def _block(name: str, prefix: str) -> str:
    """Return the part of the unchanged tensors beside a tensor."""
    if not name.startswith(f"{prefix}."):
        return OUTSIDE
    return f"block-{int(name[len(prefix) + 1 :].partition('.')[0]):05d}"


def _stored(weights: Weights, name: str) -> tuple[str, ...]:
    """Return the names on disk of what a tensor is read from."""
    return weights.derived[name].stored if name in weights.derived else (name,)


def _copied(
    weights: Weights, name: str, stored: str, changed: set[str], naming: Naming
) -> list[tuple[str, str]]:
    """Return name in the checkpoint and name to read for an unchanged tensor.

    It is copied as on disk, unless that tensor also contains weights that are factored.
    """
    on_disk = _stored(weights, stored)
    if stored in weights.derived and changed.intersection(on_disk):
        return [(name, stored)]
    if naming.by_rules or stored in weights.derived:
        return [(each, each) for each in on_disk]
    return [(name, stored)]


def _factored(sublayer: Sublayer, names: Mapping[str, str]) -> Factored:
    """Return how the weights of a sublayer are read."""
    weights = {member: names[f"{member}.weight"] for member in sublayer.members}
    return Factored(sublayer.name, weights, stacked=len(sublayer.shape) > 2)


def _factors(
    factored: Factored, sublayer: Sublayer, rank: int, storage: Storage, source: Source
) -> Part:
    """Return the part of a factored sublayer."""
    *stack, m, n = sublayer.shape
    width = source.weights.info(next(iter(factored.weights.values()))).width
    kind: Storage = "pair" if stack else storage
    size = 0
    for leaf, shape in factor_shapes(kind, m, n, rank).items():
        size += prod((*stack, *shape)) * (_INDEX_BYTES if leaf == "weight_order" else int(width))
    return Part({}, factored, size, prod(stack) * decomposition_cost((m, n)))
