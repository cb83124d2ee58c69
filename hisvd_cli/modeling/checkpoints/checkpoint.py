"""Compressed checkpoint folders: their contents and how they are opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.checkpoints.checkpoint_config import (
    QUANT_METHOD,
    architecture_of,
    quantization_of,
)
from hisvd_cli.modeling.checkpoints.folder_record import PROVENANCE
from hisvd_cli.modeling.layers.lowrank import Storage
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
    """A compressed folder on disk."""

    folder: Path
    config: dict[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """Name → rank of each low-rank sublayer, as the config says. Raises SourceError."""
        if not isinstance(self.config["quantization_config"].get("ranks"), dict):
            raise SourceError(
                f"config.json of {self.folder} names no ranks.", "Compress the model again."
            )
        return dict(self._loader.ranks)

    @property
    def bits(self) -> dict[str, int]:
        """Name → 8 or 4 of each sublayer whose matrices are integers. Raises SourceError."""
        return self._loader.bits

    @property
    def group_size(self) -> int:
        """How many columns share a scale, with 4 bits. Raises SourceError."""
        return self._loader.group_size

    def refuse_quantized(self) -> None:
        """Raise SourceError where something is integers already."""
        if self.bits:
            raise SourceError(
                f"{self.folder} is quantized already.",
                "Quantize the checkpoint that it was made from.",
            )

    def refuse_own_code(self) -> None:
        """Raise SourceError where a folder needs code of its base model, which only compress copies
        into a checkpoint, and only where somebody asks for it."""
        if code_modules(self.config) and not names_own_loader(self.config):
            raise SourceError(
                f"{self.folder} is loaded by Python code of its base model, which hisvd neither "
                "converts nor uploads.",
                "Use the folder as it is, or compress the model again.",
            )

    @cached_property
    def _loader(self) -> HiSVDConfig:
        return quantization_of(self.config, self.folder)

    @property
    def storage(self) -> Storage:
        """How its pairs are written. Raises SourceError."""
        return self._loader.storage

    @property
    def architecture(self) -> str:
        """Class name of the model. Raises SourceError."""
        return architecture_of(self.config, self.folder)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What ``hisvd.json`` records, empty where it is missing or holds no JSON object.

        Raises:
            SourceError: the file is no JSON, or a link to one elsewhere.
        """
        path = self.folder / PROVENANCE
        if not path.is_file():
            return {}
        if not is_own_file(path):  # all of it is written into what is made from this checkpoint
            raise SourceError(
                f"{path} links to a file outside its folder.", "Put the file itself there."
            )
        try:
            document = read_json(path)
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} is not valid JSON.", "Compress again.") from error
        return document if isinstance(document, dict) else {}

    @cached_property
    def weights(self) -> Weights:
        """The tensors. Raises SourceError."""
        return open_weights(self.folder)


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a model that hisvd compressed."""
    if not (folder / "config.json").is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a compressed folder. Raises SourceError where it is none."""
    if not is_checkpoint(folder):
        raise SourceError(
            f"{folder} is not a compressed model.", "Give a folder that 'hisvd compress' wrote."
        )
    if (folder / adapter_input.CONFIG).is_file():
        raise UnsupportedModelError(*adapter_input.on_compressed(str(folder)))
    return Checkpoint(folder, read_config(folder))
