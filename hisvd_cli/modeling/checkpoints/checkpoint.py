"""Opens compressed checkpoint folders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.checkpoints.checkpoint_config import (
    QUANT_METHOD,
    architecture_of,
    quantization_of,
)
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE
from hisvd_cli.modeling.checkpoints.record_schema import check_record
from hisvd_cli.modeling.layers.lowrank import FACTORS, Storage
from hisvd_cli.modeling.sources import adapter_input
from hisvd_cli.modeling.sources.companions import is_own_file
from hisvd_cli.modeling.sources.source import code_modules, names_own_loader, read_config
from hisvd_cli.modeling.sources.weights import Weights, open_weights
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from hisvd_cli.utils.files.json_files import read_json

if TYPE_CHECKING:
    from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Checkpoint:
    """A compressed checkpoint folder."""

    folder: Path
    config: dict[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """Name → rank of each low-rank sublayer. Raises SourceError."""
        if not isinstance(self.config["quantization_config"].get("ranks"), dict):
            raise SourceError(
                f"config.json of {self.folder} has no ranks.", "Compress the model again."
            )
        return dict(self._loader.ranks)

    @property
    def bits(self) -> dict[str, int]:
        """Name → 8 or 4 for each quantized sublayer. Raises SourceError."""
        return self._loader.bits

    @property
    def group_size(self) -> int:
        """Columns per scale with 4 bits. Raises SourceError."""
        return self._loader.group_size

    def refuse_quantized(self) -> None:
        """Raise SourceError if the checkpoint is quantized."""
        if self.bits:
            raise SourceError(
                f"{self.folder} is already quantized.",
                "Quantize the checkpoint that it was made from.",
            )

    def refuse_own_code(self) -> None:
        """Raise SourceError if loading needs Python code of the base model. Only compress copies
        such code, and only with ``trust_remote_code``."""
        if code_modules(self.config) and not names_own_loader(self.config):
            raise SourceError(
                f"{self.folder} needs Python code of its base model, which hisvd neither converts "
                "nor uploads.",
                "Use the folder as it is, or compress the model again.",
            )

    @cached_property
    def _loader(self) -> HiSVDConfig:
        return quantization_of(self.config, self.folder)

    @property
    def storage(self) -> Storage:
        """Storage of the factors. Raises SourceError."""
        return self._loader.storage

    @property
    def experts(self) -> str | None:
        """Layout of the stacks of experts; None if there are none. Raises SourceError."""
        return self._loader.experts

    @property
    def factor_parameters(self) -> int:
        """Number of parameters in the low-rank factors. Raises SourceError."""
        infos = self.weights.infos
        names = (f"{name}.{leaf}" for name in self.ranks for leaf in FACTORS[self.storage])
        # Stacks have no order of outputs, whatever the storage.
        return sum(prod(infos[name].shape) for name in names if name in infos)

    @property
    def architecture(self) -> str:
        """Class name of the model. Raises SourceError."""
        return architecture_of(self.config, self.folder)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Content of ``hisvd.json``; empty if it is missing or not a JSON object.

        Raises:
            SourceError: see :attr:`unchecked_provenance`, or an entry has a wrong type.
        """
        check_record(self.unchecked_provenance, str(self.folder / PROVENANCE))
        return self.unchecked_provenance

    @cached_property
    def unchecked_provenance(self) -> dict[str, Any]:
        """:attr:`provenance`, whose entries may have wrong types.

        Raises:
            SourceError: the file is not valid JSON, or links to a file outside the folder.
        """
        path = self.folder / PROVENANCE
        if not path.is_file():
            return {}
        if not is_own_file(path):  # its content is copied into derived checkpoints
            raise SourceError(
                f"{path} links to a file outside its folder.", "Replace the link with the file."
            )
        try:
            document = read_json(path)
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} is not valid JSON.", "Compress the model again.") from error
        return document if isinstance(document, dict) else {}

    @cached_property
    def weights(self) -> Weights:
        """The tensors. Raises SourceError."""
        return open_weights(self.folder)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder contains a model compressed by hisvd."""
    if not (folder / "config.json").is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a compressed checkpoint folder.

    Raises:
        SourceError: it is not a compressed checkpoint.
        UnsupportedModelError: it also contains a LoRA adapter.
    """
    if not is_checkpoint(folder):
        raise SourceError(
            f"{folder} is not a compressed model.", "Give a folder written by 'hisvd compress'."
        )
    if (folder / adapter_input.CONFIG).is_file():
        raise UnsupportedModelError(*adapter_input.on_compressed(str(folder)))
    return Checkpoint(folder, read_config(folder))
