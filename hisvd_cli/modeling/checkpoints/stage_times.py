"""Durations of the steps of a compression, stored in the cache.

A checkpoint does not contain times, so that a repeated run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hisvd_cli.modeling.checkpoints.folder_record import FILES
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.fingerprints import cache_root, digest
from hisvd_cli.utils.files.json_files import read_json


def keep_times(record: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Store the seconds of each step for the checkpoint with this ``hisvd.json``, if the cache can
    be written."""
    with suppress(OutputError):
        write_text(_path(record), json.dumps(dict(seconds)) + "\n")


def times_of(record: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the stored seconds of each step, in order; None if there are none on this machine, or
    the file is damaged."""
    try:
        document = read_json(_path(record))
        return {str(stage): float(value) for stage, value in document.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _path(record: Mapping[str, Any]) -> Path:
    made = {key: value for key, value in record.items() if key != FILES}
    return cache_root() / "times" / f"{digest(json.dumps(made, sort_keys=True))}.json"
