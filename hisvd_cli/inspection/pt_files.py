"""Reads and checks ``.pt`` files written by hisvd."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.modeling.checkpoints.record_schema import check_record
from hisvd_cli.modeling.pickles.foreign import read_foreign
from hisvd_cli.modeling.sources.companions import CARD, is_companion
from hisvd_cli.modeling.sources.weights import check_plain
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.library_errors import library_errors

PT_FORMAT = "hisvd-pt"
PT_VERSION = 1
"""A ``.pt`` file is a dict of plain types and tensors: format, format_version, config, provenance,
tensors (name → tensor) and files (name → bytes as a uint8 tensor)."""
OWN_TEXTS = (CARD, PLAN_FILE)


def is_unpacked(name: str) -> bool:
    """Return whether a file of this name is unpacked from a ``.pt`` file."""
    return name in OWN_TEXTS or is_companion(name)


def is_own_pt(document: object) -> bool:
    """Return whether a loaded document is a ``.pt`` file of hisvd."""
    return isinstance(document, dict) and document.get("format") == PT_FORMAT


def load_pt(path: Path) -> dict[str, Any]:
    """Read a ``.pt`` file of hisvd, with memory-mapped tensors, and check its parts.

    Raises:
        SourceError: the file is of another kind, or damaged.
    """
    document = open_pt(path)
    check_parts(path, document)
    check_record(document["provenance"], f"The provenance in {path}")
    return document


def open_pt(path: Path) -> dict[str, Any]:
    """Read a ``.pt`` file of hisvd, without checking its parts. Raises SourceError for others."""
    hint = f"Inspect it safely with: hisvd inspect {path}"
    damaged = SourceError(f"{path} is not a .pt file of hisvd, or it is damaged.", hint)
    read_foreign(path)  # first: checks the declared sizes, which torch would trust
    with library_errors(lambda _: damaged):
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not is_own_pt(document) or document.get("format_version") != PT_VERSION:
        raise SourceError(f"{path} is a .pt file of another hisvd version or another tool.", hint)
    loaded: dict[str, Any] = document
    return loaded


def check_parts(path: Path, document: Mapping[str, Any]) -> None:
    """Raise SourceError if a part of the document is missing or has the wrong type.

    Args:
        path: the file.
        document: the loaded content.
    """
    hint = f"Inspect it safely with: hisvd inspect {path}"
    for part in ("tensors", "files"):
        held = document.get(part)
        if not isinstance(held, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in held.items()
        ):
            raise SourceError(f"{path} is damaged: its {part} are not named tensors.", hint)
        check_plain(path, held, hint)
    for part in ("config", "provenance"):
        if not _is_json(document.get(part)):
            raise SourceError(f"{path} is damaged: its {part} is not a JSON object.", hint)


def _is_json(document: object) -> bool:
    """Return whether a document is a dict that survives a round trip through JSON."""
    try:
        return isinstance(document, dict) and parse_json(json.dumps(document)) == document
    except (ValueError, TypeError, RecursionError):
        return False
