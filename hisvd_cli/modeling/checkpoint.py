"""Compressed folders: their files, how they are written, and how they are opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd_cli.modeling.folder_record import PROVENANCE
from hisvd_cli.modeling.layers.lowrank import Storage
from hisvd_cli.modeling.sources import adapter_input
from hisvd_cli.modeling.sources.companions import is_own_file
from hisvd_cli.modeling.sources.source import code_modules, names_own_loader, read_config
from hisvd_cli.modeling.sources.weights import INDEX, SINGLE, Weights, open_weights
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.json_files import read_json
from hisvd_cli.utils.files.tensorfile import join_files, reason, write_json, write_tensors
from hisvd_cli.utils.library_errors import library_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig

PLAN_FILE = "plan.json"
FORMAT_VERSION = 1
QUANT_METHOD = "hisvd"
SHARD_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}  # transformers refuses safetensors files without it


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
            raise SourceError(f"{path} is no valid JSON file.", "Compress again.") from error
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
            f"{folder} is no compressed model.", "Give a folder that 'hisvd compress' wrote."
        )
    if (folder / adapter_input.CONFIG).is_file():
        raise UnsupportedModelError(*adapter_input.on_compressed(str(folder)))
    return Checkpoint(folder, read_config(folder))


def quantization_of(config: Mapping[str, Any], where: Path) -> HiSVDConfig:
    """Return ranks, storage and bits as a config.json names them, checked as the loader does.

    Args:
        config: its content.
        where: the folder or file that holds it.

    Raises:
        SourceError: it names none, or what cannot be.
    """
    from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig

    try:
        return HiSVDConfig(**config["quantization_config"])
    except (ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"config.json of {where} cannot be used: {reason(error)}",
            "Compress the model again, or use the version of hisvd that wrote it.",
        ) from error


def architecture_of(config: Mapping[str, Any], where: Path) -> str:
    """Return the class name of the model of a config.json. Raises SourceError."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise SourceError(f"config.json of {where} names no architecture.", "Compress again.")
    return str(named[0])


def compressed_config(
    config: Mapping[str, Any],
    architecture: str,
    ranks: Mapping[str, int],
    storage: Storage,
    **quantized: Any,
) -> dict[str, Any]:
    """Return config.json of the compressed model: the base model's, ranks, and how to load it.

    Args:
        config: of the base model.
        architecture: class name of the model.
        ranks: of the low-rank sublayers.
        storage: of those.
        quantized: ``bits`` and ``group_size``, where some are integers.
    """
    from hisvd_cli.modeling.layers.transformers_plugin import (
        AUTO_MAP,
        HiSVDConfig,
        format_version_of,
    )

    version = format_version_of(storage, quantized.get("bits"))
    quantization = HiSVDConfig(ranks, version, storage, **quantized)
    return {
        **config,
        "architectures": [architecture],
        "auto_map": dict(AUTO_MAP),
        "quantization_config": quantization.to_dict(),
    }


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without anything that hisvd added."""
    added = {"quantization_config", "auto_map"}
    return {key: value for key, value in config.items() if key not in added}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a model whose output head is stored beside the embedding."""
    text = config.get("text_config")
    inner = (
        {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    )
    return {**config, **inner, "tie_word_embeddings": False}


def write_loader(folder: Path) -> None:
    """Put the code beside the weights that ``trust_remote_code=True`` needs where hisvd is not
    installed."""
    from hisvd_cli.modeling.layers.transformers_plugin import remote_code_files

    for name, path in remote_code_files().items():
        shutil.copyfile(path, folder / name)


def shard_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names, in order, into groups of at most ``limit`` bytes (one item may exceed it)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def shard_file(index: int, count: int) -> str:
    """Return the file name of shard ``index`` of ``count``."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Write the index of a sharded checkpoint (file → tensor names); a single file needs none.
    Other weight files, and an index that is not needed, are removed."""
    for path in folder.glob("*.safetensors"):
        if path.name not in files:
            path.unlink()
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def parts_left(home: Path, shards: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the parts (of shard → parts) that are to be made: no run has written them yet, or they
    were damaged since.

    Parts are joined once all are there. Where one is missing nevertheless, a file was damaged: then
    weight files that were joined already are removed, as what is made may follow from their parts.
    """

    def left() -> list[str]:
        return [
            part
            for file, parts in shards.items()
            if not intact(home / file)
            for part in parts
            if not intact(home / f"{part}.part")
        ]

    if left():
        for file in shards:
            (home / file).unlink(missing_ok=True)
    return left()


def join_parts(
    home: Path,
    shards: Mapping[str, Sequence[str]],
    names: Mapping[str, Sequence[str]],
    total_bytes: int,
) -> None:
    """Join finished parts (``PART.part``) into weight files, remove the parts, write the index.

    Args:
        home: where they lie.
        shards: file → its parts.
        names: part → names of its tensors.
        total_bytes: of all tensors.
    """
    for file, parts in shards.items():
        pieces = [home / f"{part}.part" for part in parts]
        if not intact(home / file):
            join_files(pieces, home / file, _METADATA)
        for piece in pieces:
            piece.unlink(missing_ok=True)
    held = {
        file: [name for part in parts for name in names[part]] for file, parts in shards.items()
    }
    write_index(home, held, total_bytes)


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    limit: int = SHARD_BYTES,
) -> None:
    """Write tensors into shards of at most ``limit`` bytes; one shard is in memory. Shards that an
    interrupted run left are kept.

    Args:
        folder: where to.
        sizes: name → bytes.
        make: returns a tensor by its name; called in the order of ``sizes``.
        limit: bytes per shard.
    """
    groups = shard_names(sizes, limit)
    files = {shard_file(i, len(groups)): names for i, names in enumerate(groups)}
    for file, names in files.items():
        if not intact(folder / file):
            write_tensors(folder / file, {name: make(name) for name in names}, _METADATA)
    write_index(folder, files, sum(sizes.values()))


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a dense or compressed folder with transformers, strictly.

    The loader that a compressed folder carries is not run: the installed one does the same.

    Raises:
        SourceError: tensors are missing, superfluous or misshapen.
    """
    from transformers import AutoModelForCausalLM

    import hisvd_cli.modeling.layers.transformers_plugin  # noqa: F401  (registers the loader)

    open_weights(folder)
    hint = f"Look closer with: hisvd inspect {folder}"
    with library_errors(lambda why: SourceError(f"transformers cannot load {folder}: {why}", hint)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code and not names_own_loader(read_config(folder)),
        )
    _check_loading(folder, loaded[1])
    model: PreTrainedModel = loaded[0].to(device)
    model.eval()
    return model


def _check_loading(folder: Path, report: Mapping[str, Sequence[Any]]) -> None:
    for kind, word in (("missing_keys", "lacks"), ("mismatched_keys", "holds misshapen")):
        if keys := sorted(str(key) for key in report.get(kind, ())):
            raise SourceError(
                f"{folder} {word} {len(keys)} tensors: {', '.join(keys[:3])}.",
                f"Look closer with: hisvd inspect {folder}",
            )
