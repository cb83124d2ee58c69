"""The structure of a model: sublayers, sizes and tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hisvd_cli.allocation.plan_assembly import ModelSize
from hisvd_cli.modeling.layers.shapes import active_parameters, is_stack, numel
from hisvd_cli.modeling.sources.model_config import experts_per_token
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers, select
from hisvd_cli.modeling.structure.tensors import check_shape, tensor_names

_KEPT = "_anatomy"


@dataclass(frozen=True)
class Anatomy:
    """The structure of a model: all sublayers, its size, and the names of its tensors on disk.

    ``experts_per_token`` is None if there are no stacks of experts, or if the config does not say.
    """

    sublayers: list[Sublayer]
    total_parameters: int
    names: dict[str, str]
    experts_per_token: int | None = None

    @property
    def active_parameters(self) -> int | None:
        """Parameters that one token uses; None if ``experts_per_token`` is None."""
        stacks = [(s.shape, numel(s.shape)) for s in self.sublayers if is_stack(s.shape)]
        return active_parameters(self.total_parameters, stacks, self.experts_per_token)

    @property
    def inside(self) -> int:
        """Parameters of all sublayers."""
        return sum(numel(s.shape) for s in self.sublayers)

    def size(self, include: Sequence[str], exclude: Sequence[str]) -> ModelSize:
        """Return the size of the model and of the sublayers that a plan covers."""
        chosen = select(self.sublayers, include, exclude)
        return ModelSize(self.total_parameters, sum(numel(s.shape) for s in chosen))


def dissect(source: Source) -> Anatomy:
    """Return the structure of a model, without reading weights.

    The result is cached with the source: building a large model takes a second, and a run needs the
    structure several times.

    Raises:
        UnsupportedModelError: the model cannot be factored.
        SourceError: a tensor is missing, or its shape differs from the config.
    """
    kept = vars(source)
    if _KEPT not in kept:
        kept[_KEPT] = _dissected(source)
    anatomy: Anatomy = kept[_KEPT]
    return anatomy


def _dissected(source: Source) -> Anatomy:
    model = build_meta_model(source)
    prefix, layers = decoder_blocks(model)
    names = tensor_names(model, source)
    shapes = model.state_dict()
    for name, stored in names.items():
        check_shape(name, source.weights.info(stored).shape, shapes[name].shape)
    total = sum({stored: shapes[name].numel() for name, stored in names.items()}.values())
    sublayers = find_sublayers(prefix, list(layers))
    experts = any(is_stack(s.shape) for s in sublayers)
    return Anatomy(sublayers, total, names, experts_per_token(source.config) if experts else None)
