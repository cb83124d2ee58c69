"""A model whose truncated weights were multiplied out and corrected: the original with some tensors
of other files over it, so that nothing else is copied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hisvd_cli.modeling.skeleton import tensor_names
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.utils.files.fingerprints import digest, file_digest
from hisvd_cli.utils.files.tensorfile import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Corrected(Source):
    """A model with weights of its own for some sublayers.

    Attributes:
        teacher: the original, whose everything else it has.
        changed: folder of safetensors files with those weights, by their names on disk.
    """

    teacher: Source
    changed: Path

    @property
    def original(self) -> Source:
        """The model as it was published."""
        return self.teacher

    @cached_property
    def weights(self) -> Weights:
        """The tensors on disk, its own before the original's. Raises SourceError."""
        weights = self.teacher.weights
        infos, where, recipes = dict(weights.infos), dict(weights.where), dict(weights.recipes)
        for path in self.changed_files:
            found = read_header(path).tensors
            infos |= found
            where |= dict.fromkeys(found, path)
            recipes = {name: made for name, made in recipes.items() if name not in found}
        return replace(weights, infos=infos, where=where, recipes=recipes)

    @property
    def changed_files(self) -> list[Path]:
        """The files of its own weights, sorted by name."""
        return sorted(self.changed.glob("*.safetensors"))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the original's fingerprint and of its own weights."""
        own = [f"{path.name} {file_digest(path)}" for path in self.changed_files]
        return digest("corrected", self.teacher.fingerprint, *own)


def corrected(teacher: Source, changed: Path) -> Corrected:
    """Return a model with the weights in ``changed`` in the place of its own."""
    return Corrected(
        teacher.name,
        teacher.folder,
        teacher.revision,
        teacher.trust_remote_code,
        teacher.adapter_folder,
        teacher=teacher,
        changed=changed,
    )


@torch.no_grad()
def take_corrected(source: Source, model: PreTrainedModel) -> None:
    """Put the corrected weights of ``source``, where it has any, into its loaded original."""
    if not isinstance(source, Corrected):
        return
    own = {name for path in source.changed_files for name in read_header(path).tensors}
    for name, stored in tensor_names(model, source).items():
        if stored in own:
            model.get_parameter(name).copy_(source.weights.read(stored))
