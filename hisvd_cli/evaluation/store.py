"""Cache of evaluation results: sums over blocks of tokens, one file per measurement.

A measurement is one checkpoint in one precision on the tokens of one text, with or without a
baseline. Its file is written while windows are measured, so that an interrupted run resumes after
the last stored window. Sums are stored instead of figures, so that any two models can be compared
later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.evaluation.perplexity import Sums
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.checksums import text_checksum
from hisvd_cli.utils.files.fingerprints import cache_root
from hisvd_cli.utils.files.json_files import read_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Store:
    """A folder with one file per measurement, by key.

    Attributes:
        folder: the folder.
    """

    folder: Path
    _known: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Documents that could not be written to the folder; None for one that could not be removed."""

    def path(self, key: str) -> Path:
        """Return the file of a measurement."""
        return self.folder / f"{key}.json"

    def load(self, key: str) -> Sums | None:
        """Return the sums of the completed windows; None if there are none or the file is
        damaged."""
        document = self.load_document(key)
        if document is None:
            return None
        try:
            kept = document["sums"]
            return _same_rows(Sums(_rows(kept["nats"]), _read(kept["kl"]), _read(kept["agreed"])))
        except (ValueError, KeyError, TypeError):
            return None

    def save(self, key: str, about: Mapping[str, Any], sums: Sums) -> None:
        """Write the sums of the completed windows with a description of the measurement."""
        kept = {part.name: _written(getattr(sums, part.name)) for part in fields(sums)}
        self.save_document(key, {**about, "sums": kept})

    def load_document(self, key: str) -> dict[str, Any] | None:
        """Return any document by its key; None if there is none or the file is damaged."""
        if key in self._known:
            return self._known[key]
        try:
            document = read_json(self.path(key))
            found = document.pop("checksum")
            right = document["key"] == key and found == text_checksum(_text(document))
            return dict(document) if right else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save_document(self, key: str, document: Mapping[str, Any]) -> None:
        """Write any document under a key; it is kept in memory if the folder is not writable."""
        whole = {"key": key, **document}
        checked = {**whole, "checksum": text_checksum(_text(whole))}
        try:
            write_text(self.path(key), _text(checked) + "\n")
            self._known.pop(key, None)
        except OutputError:
            self._known[key] = json.loads(_text(whole))

    def forget(self, key: str) -> None:
        """Remove a measurement."""
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError:
            self._known[key] = None


def open_store() -> Store:
    """Return the store in the cache folder of hisvd."""
    return Store(cache_root() / "evaluations")


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, allow_nan=False)


def _read(rows: list[list[float | None]] | None) -> Tensor | None:
    return None if rows is None else _rows(rows)


def _rows(rows: list[list[float | None]]) -> Tensor:
    values = [[math.nan if value is None else value for value in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def _same_rows(sums: Sums) -> Sums:
    """Return the sums unchanged. Raises ValueError if their shapes differ."""
    shapes = [part.shape for part in (sums.nats, sums.kl, sums.agreed) if part is not None]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError("sums of different shapes")
    return sums


def _written(sums: Tensor | None) -> list[list[float | None]] | None:
    if sums is None:
        return None
    return [[v if math.isfinite(v) else None for v in row] for row in sums.tolist()]
