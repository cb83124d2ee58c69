"""The parts of a ``.pt`` file of hisvd: are they what every reader takes them for?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hisvd_cli.errors import SourceError
from hisvd_cli.json_files import parse_json
from hisvd_cli.weights import check_plain


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
