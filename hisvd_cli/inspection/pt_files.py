"""Reading ``.pt`` files of hisvd: are their parts what every reader takes them for?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
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


def travels(name: str) -> bool:
    """Tell whether a file of this name is unpacked from a ``.pt`` file."""
    return name in OWN_TEXTS or is_companion(name)


def is_own_pt(document: object) -> bool:
    """Tell whether what ``torch.load`` gave is a file of ours."""
    return isinstance(document, dict) and document.get("format") == PT_FORMAT


def load_pt(path: Path) -> dict[str, Any]:
    """Read one of our ``.pt`` files, its tensors mapped from the file, and check its parts.

    Raises:
        SourceError: another kind of file, or a damaged one.
    """
    document = open_pt(path)
    check_parts(path, document)
    return document


def open_pt(path: Path) -> dict[str, Any]:
    """Read one of our ``.pt`` files; its parts may be anything. Raises SourceError for others."""
    hint = f"Look at it safely with: hisvd inspect {path}"
    damaged = SourceError(f"{path} is not a .pt file of hisvd, or it is damaged.", hint)
    read_foreign(path)  # first: it holds what it declares, which torch would believe
    with library_errors(lambda _: damaged):
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not is_own_pt(document) or document.get("format_version") != PT_VERSION:
        raise SourceError(f"{path} is not a .pt file of this version of hisvd.", hint)
    loaded: dict[str, Any] = document
    return loaded


def check_parts(path: Path, document: Mapping[str, Any]) -> None:
    """Raise SourceError where a part is missing, or is not what it should be.

    Args:
        path: the file.
        document: what ``torch.load`` gave.
    """
    hint = f"Look at it safely with: hisvd inspect {path}"
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
    """Tell whether a document can be written as JSON, and is the same when it is read again."""
    try:
        return isinstance(document, dict) and parse_json(json.dumps(document)) == document
    except (ValueError, TypeError, RecursionError):
        return False
