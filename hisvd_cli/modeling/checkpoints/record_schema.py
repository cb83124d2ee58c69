"""Checks the types of the entries of ``hisvd.json`` that hisvd reads.

People publish and edit these files, and files of earlier versions lack entries: every entry at the
top is optional, and other entries are allowed everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one below 3.12

from hisvd_cli.utils.errors import SourceError

_Count = Annotated[int, Field(ge=0)]


class _Model(TypedDict):
    name: str
    revision: NotRequired[str | None]
    fingerprint: NotRequired[str]


class _Data(TypedDict):
    dataset: str
    samples: _Count
    seqlen: _Count
    seed: _Count
    drop: NotRequired[str]


class _Calibration(TypedDict):
    data: _Data
    key: NotRequired[str]


class _Update(TypedDict):
    method: str
    samples: _Count
    seqlen: _Count


class _TrainingData(TypedDict, total=False):
    dataset: str
    sha256: str


class _Recovery(TypedDict, total=False):
    method: str
    tokens: _Count | None
    data: _TrainingData
    settings: dict[str, dict[str, Any]]


class _Quantization(TypedDict, total=False):
    bits: dict[str, int]
    method: str
    group_size: _Count
    bytes: _Count
    dense_bytes: Annotated[int, Field(ge=1)]
    storage: Literal["pair", "pivoted"]


class _Record(TypedDict, total=False):
    kind: str
    model: _Model
    decomposer: str
    allocator: str
    ratio: float
    calibration: _Calibration | None
    gradients: dict[str, Any] | None
    settings: dict[str, dict[str, Any]]
    versions: dict[str, str]
    files: dict[str, str]
    stages: list[dict[str, Any]]
    update: _Update | None
    recovery: _Recovery
    quantization: _Quantization


_RECORD = TypeAdapter(_Record)


def record_problem(record: Mapping[str, Any]) -> str:
    """Return which entry of a record is missing or has a wrong type; empty if none."""
    try:
        _RECORD.validate_python(record, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        entry = ".".join(map(str, first["loc"])) or "the record"
        return f"{entry}: {first['msg']}"
    return ""


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Check the entries of a record that hisvd reads.

    Args:
        record: the content of ``hisvd.json``.
        where: its file, for errors.

    Raises:
        SourceError: an entry has a wrong type; names the entry.
    """
    if problem := record_problem(record):
        raise SourceError(f"{where} is damaged: {problem}.", "Restore the file.")
