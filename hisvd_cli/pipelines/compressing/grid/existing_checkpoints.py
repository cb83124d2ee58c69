"""Existing checkpoints of a grid: kept if they match the settings, rejected if not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hisvd_cli.calibration.store import Calibration
from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import is_checkpoint, open_checkpoint
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.compressing.compression_checks import check_request
from hisvd_cli.pipelines.compressing.grid.cells import Cell
from hisvd_cli.pipelines.recovering.recovery_checks import wants_recovery
from hisvd_cli.pipelines.recovering.recovery_texts import is_same_text
from hisvd_cli.pipelines.samples import is_text_of
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.fingerprints import expanded
from hisvd_cli.utils.progress import Reporter


def missing_cells(
    cells: Sequence[Cell],
    source: Source,
    overwrite: bool,
    reporter: Reporter,
    calibration: Calibration | None,
) -> list[Cell]:
    """Return the cells that have to be made.

    Raises:
        OutputError: an existing checkpoint was made with other settings.
        HisvdError: see :func:`check_request`.
    """
    missing = []
    for cell in cells:
        if not overwrite and is_checkpoint(cell.output):
            check_same(cell, source, calibration)
            reporter.note(f"{cell.output} exists already.")
            continue
        check_request(cell.resolved, source, cell.output, None, overwrite)
        missing.append(cell)
    return missing


def check_same(cell: Cell, source: Source, calibration: Calibration | None) -> None:
    """Check that an existing checkpoint was made with the settings of its cell. Raises
    OutputError."""
    record = open_checkpoint(cell.output).provenance
    made_with, wanted = part(record, "settings"), cell.resolved.recorded()
    differs = [
        f"{section}.{key}"
        for section in ("plan", "compress", "quantize", "calibration")
        for key in {**wanted[section], **part(made_with, section)}
        if part(made_with, section).get(key) != wanted[section].get(key)
    ]
    trained = part(part(part(record, "recovery"), "settings"), "recover")
    if trained.get("method", "none") != wanted["recover"]["method"] or (
        trained and trained != wanted["recover"]
    ):
        differs.append("recover")
    if part(made_with, "model").get("dtype") != wanted["model"]["dtype"]:
        differs.append("model.dtype")
    if part(record, "model").get("fingerprint") != source.fingerprint:
        differs = ["model"]
    elif calibration and part(record, "calibration").get("key") != calibration.key:
        differs.append("calibration")
    differs += _changed_texts(cell, source, record)
    if differs:
        raise OutputError(
            f"{cell.output} was made with other settings: {', '.join(differs)}.",
            "Pass `overwrite`, or name another `output`.",
        )


def _changed_texts(cell: Cell, source: Source, record: Mapping[str, Any]) -> list[str]:
    """Return which texts have changed under the same name since a checkpoint was made.

    Raises:
        DataError: a text cannot be read.
    """
    changed = []
    dataset, data = cell.resolved.settings.calibration.dataset, part(record, "calibration")
    if expanded(dataset).is_file() and not is_text_of(dataset, part(data, "data")):
        changed.append(f"the text of {dataset}")
    if wants_recovery(cell.resolved) and not is_same_text(cell.resolved, source, record):
        changed.append("the training text")
    return changed
