"""A model with some weights replaced by corrected ones, without copying the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.modeling.structure.tensors import tensor_names
from hisvd_cli.utils.files.fingerprints import digest, file_digest
from hisvd_cli.utils.files.tensorfile import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Corrected(Source):
    """A model with replaced weights for some sublayers.

    Attributes:
        teacher: the original model, which provides everything else.
        changed: folder of safetensors files with the replaced weights, by their names on disk.
    """

    teacher: Source
    changed: Path

    @property
    def original(self) -> Source:
        """The original model."""
        return self.teacher

    @cached_property
    def weights(self) -> Weights:
        """The tensors on disk, with replaced weights taking precedence. Raises SourceError."""
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
        """The files of the replaced weights, sorted by name."""
        return sorted(self.changed.glob("*.safetensors"))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the original's fingerprint and of the replaced weights."""
        own = [f"{path.name} {file_digest(path)}" for path in self.changed_files]
        return digest("corrected", self.teacher.fingerprint, *own)


def corrected(teacher: Source, changed: Path) -> Corrected:
    """Return ``teacher`` with the weights in ``changed`` replacing its own."""
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
    """Copy the corrected weights of ``source``, if any, into the loaded original model."""
    if not isinstance(source, Corrected):
        return
    own = {name for path in source.changed_files for name in read_header(path).tensors}
    for name, stored in tensor_names(model, source).items():
        if stored in own:
            model.get_parameter(name).copy_(source.weights.read(stored))
