"""Inspects pickles of hisvd or of other tools without executing them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from hisvd_cli.allocation.plan import plan_from
from hisvd_cli.inspection.audit import (
    Audit,
    parameters_on_disk,
    plan_problems,
    provenance_problems,
    provenance_table,
    tensor_problems,
    value_problems,
)
from hisvd_cli.inspection.pt_files import check_parts, is_unpacked, open_pt
from hisvd_cli.inspection.stored_sublayers import Layout, Row, rows_of, sublayer_shapes
from hisvd_cli.inspection.surplus import surplus_problems
from hisvd_cli.modeling.checkpoints.checkpoint import PLAN_FILE
from hisvd_cli.modeling.checkpoints.checkpoint_config import quantization_of
from hisvd_cli.modeling.pickles.foreign import ForeignCheckpoint, ForeignTensor, read_foreign
from hisvd_cli.modeling.pickles.low_rank_pairs import find_pairs
from hisvd_cli.modeling.structure.sublayers import Sublayer
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.files.safetensors_header import dtype_name

PICKLES = {".pt", ".pth", ".bin", ".pkl"}

_PLAIN = re.compile(
    r"torch\.(\w+Storage|storage\.\w+Storage|_utils\._rebuild_\w+)|collections\.OrderedDict"
)
_MAX_CLASSES = 6


def audit_pickle(target: str, path: Path, check_values: bool) -> Audit:
    """Inspect a pickle without executing it. If it only contains tensors and was written by hisvd,
    its config and provenance are inspected as well.

    Raises:
        SourceError: the file is damaged, or not a torch pickle.
    """
    found = read_foreign(path)
    if not found.classes and all(map(_PLAIN.fullmatch, found.globals_seen)):
        try:
            document = open_pt(path)
        except SourceError:  # a plain state dict
            return _audit_foreign(target, found)
        check_parts(path, document)
        return _audit_own(target, path, document, check_values)
    return _audit_foreign(target, found)


def _audit_own(target: str, path: Path, document: Mapping[str, Any], check_values: bool) -> Audit:
    try:
        tensors = document["tensors"]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        dtypes = {name: dtype_name(t.dtype) for name, t in tensors.items()}
        known = quantization_of(document["config"], path)
        layout = Layout(known.ranks, known.storage, known.bits, known.group_size)
        plan = plan_from(parse_json(document["files"][PLAN_FILE].numpy().tobytes()))
        provenance = dict(document["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{path} is damaged: its parts are inconsistent.", "Convert the checkpoint again."
        ) from error
    sublayers = [Sublayer(s.name, s.layer, s.cluster, s.shape) for s in plan.sublayers]
    rows = rows_of(sublayers, dtypes, layout)
    expected = sublayer_shapes(sublayers, layout)
    problems = surplus_problems(document["config"], expected, shapes)
    problems += tensor_problems(expected, shapes) + plan_problems(plan, rows)
    problems += [
        f"The file '{name}' does not belong to a checkpoint: 'hisvd convert' ignores it."
        for name in document["files"]
        if not is_unpacked(str(name))
    ]
    problems += provenance_problems(provenance)
    if check_values:
        problems += value_problems(tensors.items())
    held = parameters_on_disk(sublayer_shapes(sublayers, layout, packed=False), shapes)
    active = plan.active_parameters
    return Audit(
        "pt",
        target,
        parameters=held,
        dense_parameters=held + _saved(rows),
        bytes=path.stat().st_size,
        sublayers=rows,
        provenance=provenance,
        problems=problems,
        table={**provenance_table(provenance), "storage": known.storage},
        active=active and active[::-1],
    )


def _audit_foreign(target: str, found: ForeignCheckpoint) -> Audit:
    pairs, dense = find_pairs(found)
    rows = [Row(p.name, p.layer, p.cluster, p.shape, p.rank, False, p.dtype) for p in pairs]
    rows += map(_dense_row, dense)
    rows.sort(key=lambda row: (-1 if row.layer is None else row.layer, row.name))
    held = sum(prod(tensor.shape) for tensor in found.tensors.values())
    classes = sorted(set(found.classes.values()))
    more = len(classes) - _MAX_CLASSES
    shown = classes[:_MAX_CLASSES] + [f"{more} more"] * (more > 0)
    return Audit(
        "pt",
        target,
        parameters=held,
        dense_parameters=held + _saved(rows),
        bytes=found.file_bytes,
        sublayers=rows,
        provenance={"classes": classes, "globals": list(found.globals_seen)},
        problems=list(found.problems),
        table={
            "format": "pickle of another tool; not executed",
            "tensors": f"{len(found.tensors)}, {found.tensor_bytes:,} bytes",
            "classes": ", ".join(shown) or "none: a plain state dict",
        },
    )


def _dense_row(tensor: ForeignTensor) -> Row:
    m, n = tensor.shape
    name = tensor.name.removesuffix(".weight")
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return Row(name, layer, name.rpartition(".")[2], (m, n), min(m, n), True, tensor.dtype)


def _saved(rows: list[Row]) -> int:
    """Return how many more parameters the dense matrices would have."""
    return sum(prod(row.shape) - row.parameters for row in rows)
