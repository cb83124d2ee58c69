"""A calibration on disk.

It consists of ``calibration.json`` and one safetensors file per block. The optional subfolder
``gradients/`` has the same layout.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below 3.12

from hisvd_cli.calibration.statistics_files import (
    AGAIN,
    block_file,
    join_gradients,
    read_stems,
    side_of,
    weights_file,
)
from hisvd_cli.linalg.moments import Moment
from hisvd_cli.linalg.statistics import Channels, Need, Statistics, missing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import SourceError, StaleArtifactError
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.files.json_files import parse_json, read_json
from hisvd_cli.utils.files.tensorfile import read_header

MANIFEST = "calibration.json"
GRADIENTS = "gradients"
"""Subfolder of a calibration with gradients; its manifest is ``gradients.json``."""
GRADIENTS_MANIFEST = "gradients.json"
FORMAT_VERSION = 2


class _Model(TypedDict):
    name: str
    fingerprint: str


class _Data(TypedDict):
    dataset: str
    drop: NotRequired[str]
    split: str
    tokens_sha256: str
    samples: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    seqlen: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]


class _Manifest(TypedDict):
    """The entries of ``calibration.json`` that are read; it has more."""

    key: str
    model: _Model
    data: _Data
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    settings: dict[str, dict[str, Any]]


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Sample:
    """Calibration tokens and their origin."""

    tokens: Tensor  # [S, L]
    dataset: str
    split: str
    text_digest: str
    seed: int
    drop: str = ""  # string that was removed from the text

    @property
    def key(self) -> str:
        """sha256 of the token windows."""
        return digest(str(list(self.tokens.shape)), self.tokens.numpy().tobytes())


@dataclass(frozen=True)
class Calibration:
    """A calibration on disk.

    Attributes:
        folder: the folder.
        manifest: the content of ``calibration.json``.
        gradients: the content of ``gradients.json``; None without gradients.
    """

    folder: Path
    manifest: dict[str, Any]
    gradients: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Hash of everything that the moments depend on: model, tokens and dtype."""
        return str(self.manifest["key"])

    @property
    def gradients_key(self) -> str:
        """Hash of everything that the gradients depend on; empty without gradients."""
        return str(self.gradients["key"]) if self.gradients else ""

    @property
    def holds(self) -> frozenset[Need]:
        """The kinds of statistics in this calibration."""
        if self.gradients is None:
            return frozenset({"moments"})
        if not self.gradients["weights"]:
            return frozenset({"moments", "gradients"})
        return frozenset({"moments", "gradients", "weight-gradients"})

    def require(self, needs: Collection[Need], method: str) -> None:
        """Raise SourceError with the command to run if statistics that ``method`` needs are
        missing."""
        for need in needs:
            if need not in self.holds:
                raise missing(method, need)

    def moments(self, layer: int, device: torch.device | str = "cpu") -> dict[str, Moment]:
        """Return the moments of one block by layer name; layers with a common input share one.

        Args:
            layer: index of the block.
            device: device of the tensors.

        Raises:
            SourceError: the file of the block is missing or damaged.
        """
        found = self.statistics(layer, (), device)
        return {name: each.moment for name, each in found.items() if each.moment is not None}

    def statistics(
        self,
        layer: int,
        needs: Collection[Need],
        device: torch.device | str = "cpu",
        of: Collection[str] | None = None,
    ) -> dict[str, Statistics]:
        """Return the statistics of the linear layers of one block by name.

        Args:
            layer: index of the block.
            needs: the kinds of statistics to read; others are None.
            device: device of the tensors.
            of: names of the layers to read; all by default.

        Raises:
            SourceError: a file of the block is missing or damaged.
        """
        path = self.folder / block_file(layer)
        owners = {n: keys for n, keys in self._owners(layer).items() if of is None or n in of}
        tensors = read_stems(path, device, {key for keys in owners.values() for key in keys})
        try:
            moments = {key: Moment(tensors[key], side_of(key)) for key, _ in owners.values()}
            channels = {key: Channels(*tensors[key]) for _, key in owners.values()}
            found = {
                name: Statistics(moments[moment], channels[channel])
                for name, (moment, channel) in owners.items()
            }
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise SourceError(f"{path} contains no moments.", AGAIN) from error
        if "weight-gradients" in needs:
            return self._with_gradients(layer, found, True, device)
        return self._with_gradients(layer, found, False, device) if "gradients" in needs else found

    def _with_gradients(
        self, layer: int, found: dict[str, Statistics], weights: bool, device: torch.device | str
    ) -> dict[str, Statistics]:
        path = self.folder / GRADIENTS / block_file(layer)
        keys = self.moment_keys(layer)
        stems = {*found, *(keys[name] for name in found if name in keys)}
        tensors = read_stems(path, device, stems)
        if weights:
            sequences = read_stems(self.folder / GRADIENTS / weights_file(layer), device, stems)
            tensors |= {f"sequences.{name}": tensor for name, tensor in sequences.items()}
        try:
            share = self._first_half
            return {
                name: join_gradients(each, name, keys[name], tensors, share, weights)
                for name, each in found.items()
            }
        except KeyError as error:
            raise SourceError(f"{path} lacks the gradients of {error}.", AGAIN) from error

    @property
    def _first_half(self) -> float:
        """Share of the sequences with an even index, counted from 0."""
        samples = int(self.manifest["data"]["samples"])
        return (samples + 1) // 2 / samples

    def moment_keys(self, layer: int) -> dict[str, str]:
        """Return the key of the moment of each layer by name; layers may share one.

        Raises:
            SourceError: the file of the block is missing or damaged.
        """
        return {name: moment for name, (moment, _) in self._owners(layer).items()}

    def _owners(self, layer: int) -> dict[str, tuple[str, str]]:
        """Return the keys of moment and channels of each layer by name. Raises SourceError."""
        path = self.folder / block_file(layer)
        try:
            owners = parse_json(read_header(path).metadata["block"])["owners"]
            return {name: (moment, channels) for name, (moment, channels) in owners.items()}
        except SourceError as error:
            raise SourceError(error.message, AGAIN) from error
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise SourceError(f"{path} contains no moments.", AGAIN) from error

    def importance(self, layer: int) -> float:
        """Return the mean angular distance between input and output of a block, from 0 to 1.

        Raises:
            SourceError: the file of the block is missing or damaged.
        """
        path = self.folder / block_file(layer)
        try:
            return float(parse_json(read_header(path).metadata["block"])["importance"])
        except (KeyError, ValueError, TypeError) as error:
            raise SourceError(f"{path} contains no statistics.", AGAIN) from error


def calibration_key(source: Source, sample: Sample, dtype: torch.dtype) -> str:
    """Return the hash of everything that moments depend on."""
    return digest(str(FORMAT_VERSION), source.fingerprint, sample.key, str(dtype))


def open_calibration(folder: Path, source: Source | None = None) -> Calibration:
    """Open a calibration folder.

    Raises:
        SourceError: there is no calibration, or it is damaged.
        StaleArtifactError: it belongs to another model than ``source``, or has another format.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _MANIFEST.validate_python(manifest, strict=True)
        made_for, fingerprint = manifest["model"]["name"], manifest["model"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{folder} is not a calibration (no readable {MANIFEST}).", "Run: hisvd calibrate"
        ) from error
    if version != FORMAT_VERSION:
        raise StaleArtifactError(
            f"{folder} was written by another version of hisvd (format {version} instead of "
            f"{FORMAT_VERSION}).",
            AGAIN,
        )
    if source is not None and fingerprint != source.fingerprint:
        raise StaleArtifactError(
            f"{folder} is the calibration of {made_for}, not of the weights of {source.name}.",
            "Calibrate this model, or give its calibration.",
        )
    return Calibration(folder, manifest, _open_gradients(folder, str(manifest["key"])))


def recorded_calibration(folder: Path, manifest: dict[str, Any]) -> Calibration:
    """Return the calibration, without statistics, whose manifest the record of a checkpoint has.

    Raises:
        SourceError: an entry is missing, or has a wrong type.
    """
    try:
        _MANIFEST.validate_python(manifest, strict=True)
    except ValueError as error:
        raise SourceError(
            f"The record of {folder} does not say how the model was calibrated.",
            "Restore its hisvd.json, or compress the model again.",
        ) from error
    return Calibration(folder, manifest)


def _open_gradients(folder: Path, key: str) -> dict[str, Any] | None:
    """Return the manifest of the gradients of calibration ``key``, or None."""
    try:
        path = folder / GRADIENTS / GRADIENTS_MANIFEST
        manifest: dict[str, Any] = read_json(path)
        fits = manifest["format_version"] == FORMAT_VERSION and manifest["calibration"] == key
        whole = isinstance(manifest["weights"], bool) and isinstance(manifest["key"], str)
        return manifest if fits and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
