"""Inspects models, checkpoints, plans and calibrations on disk."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

import torch

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.calibration.store import MANIFEST, Calibration, open_calibration
from hisvd_cli.inspection.audit import (
    Audit,
    parameters_on_disk,
    part,
    plan_file_problems,
    provenance_problems,
    provenance_table,
    tensor_problems,
    value_problems,
)
from hisvd_cli.inspection.pickle_audit import PICKLES, audit_pickle
from hisvd_cli.inspection.stored_sublayers import (
    Layout,
    Row,
    active_on_disk,
    rows_of,
    sublayer_shapes,
)
from hisvd_cli.modeling.checkpoints.checkpoint import (
    PLAN_FILE,
    Checkpoint,
    is_checkpoint,
    open_checkpoint,
)
from hisvd_cli.modeling.layers.shapes import is_stack
from hisvd_cli.modeling.sources.model_config import experts_per_token
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.naming import names_in_model
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers
from hisvd_cli.modeling.structure.tensors import tell_notes, tensor_names
from hisvd_cli.modeling.structure.tied import shared_tensors, tied_names
from hisvd_cli.utils.errors import HisvdError, NumericalError, SourceError
from hisvd_cli.utils.files.fingerprints import expanded
from hisvd_cli.utils.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def audit(
    target: str,
    revision: str | None,
    trust_remote_code: bool,
    check_values: bool,
    reporter: Reporter,
) -> Audit:
    """Detect the kind of ``target`` and inspect it.

    Args:
        target: path or model name.
        revision: revision of a model on the Hub.
        trust_remote_code: run the code that a model ships.
        check_values: read every tensor and check for NaN and infinite values.
        reporter: receives progress.

    Raises:
        SourceError: the target does not exist or is unreadable.
    """
    path = expanded(target)
    if path.is_file() and path.suffix == ".json":
        return _audit_plan(target, load_plan(path), path.stat().st_size)
    if path.is_file() and path.suffix in PICKLES:
        return audit_pickle(target, path, check_values)
    if (path / MANIFEST).is_file():
        return _audit_calibration(target, open_calibration(path), check_values)
    if path.is_dir() and is_checkpoint(path):
        source = Source(target, path, trust_remote_code=trust_remote_code)
        return _audit_checkpoint(source, open_checkpoint(path), check_values, reporter)
    source = open_source(target, revision, trust_remote_code, compressible=False)
    return _audit_model(source, check_values, reporter)


def _audit_plan(target: str, plan: Plan, size: int) -> Audit:
    made_for = part(plan.provenance, "model")
    total = made_for.get("parameters")
    sublayers = [Sublayer(s.name, s.layer, s.cluster, s.shape) for s in plan.sublayers]
    active = plan.active_parameters
    return Audit(
        "plan",
        target,
        parameters=total and total - plan.full_parameters + plan.kept_parameters,
        dense_parameters=total,
        bytes=size,
        sublayers=rows_of(sublayers, {}, Layout(plan.ranks, plan.storage)),
        provenance={**plan.provenance, "settings": plan.settings},
        table={
            "model": str(made_for.get("name")),
            "allocator": plan.allocator,
            "storage": plan.storage,
        },
        active=active and active[::-1],
    )


def _audit_calibration(target: str, calibration: Calibration, check_values: bool) -> Audit:
    manifest = calibration.manifest
    data = part(manifest, "data")
    files = sorted(calibration.folder.glob("block-*.safetensors"))
    layers = [int(path.stem.rpartition("-")[2]) for path in files]
    problems = [
        f"Block {i} is missing." for i in range(max(layers, default=0) + 1) if i not in layers
    ]
    if check_values:
        problems += [problem for i in layers for problem in _moment_problems(calibration, i)]
    return Audit(
        "calibration",
        target,
        parameters=0,
        dense_parameters=0,
        bytes=sum(path.stat().st_size for path in files),
        sublayers=[],
        provenance=manifest,
        problems=problems,
        table={
            "model": str(part(manifest, "model").get("name")),
            "text": f"{data.get('dataset')} ({data.get('split')})",
            "tokens": f"{data.get('samples')} × {data.get('seqlen')} = {data.get('tokens'):,}",
            "seed": str(data.get("seed")),
            "dtype": str(manifest.get("dtype")),
        },
    )


def _moment_problems(calibration: Calibration, layer: int) -> list[str]:
    try:
        moments = calibration.moments(layer)
    except HisvdError as error:
        return [error.message]
    return [
        f"{name}: the second moment is not finite."
        for name, moment in moments.items()
        if not bool(moment.matrix.isfinite().all())
    ]


def _skeleton(
    source: Source,
) -> tuple[PreTrainedModel, list[Sublayer], dict[str, tuple[int, ...]]]:
    """Return the dense model of transformers without weights, its sublayers, and tensor name →
    shape."""
    prefix, layers = decoder_blocks(build_meta_model(source, compressed=True))
    model = build_meta_model(source, compressed=True, working=False)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return model, find_sublayers(prefix, list(layers)), shapes


def _audit_checkpoint(
    source: Source, checkpoint: Checkpoint, check_values: bool, reporter: Reporter
) -> Audit:
    ranks, storage = checkpoint.ranks, checkpoint.storage
    layout = Layout(ranks, storage, checkpoint.bits, checkpoint.group_size)
    weights = checkpoint.weights
    model, sublayers, dense = _skeleton(source)
    shapes = sublayer_shapes(sublayers, layout)
    names, made_from = names_in_model(model, {**dense, **shapes}, weights)
    found = {names[n]: info.shape for n, info in weights.infos.items()}
    found |= {name: dense[name] for name in made_from if name in dense}
    dense = {name: shape for name, shape in dense.items() if not _is_copy(model, name, found)}
    changed = [s for s in sublayers if s.name in ranks or s.name in checkpoint.bits]
    replaced = {s.name if is_stack(s.shape) else f"{s.name}.weight" for s in changed}
    kept = {name: shape for name, shape in dense.items() if name not in replaced}
    expected = {**kept, **shapes}
    matrices = {**kept, **sublayer_shapes(sublayers, layout, packed=False)}
    problems = _name_problems(sublayers, ranks, expected, found)
    problems += tensor_problems(expected, found)
    dtypes = {names[name]: info.dtype for name, info in weights.infos.items()}
    rows = rows_of(sublayers, dtypes, layout)
    problems += _record_problems(checkpoint, rows)
    made = checkpoint.unchecked_provenance
    if check_values:
        problems += _value_problems(weights, reporter)
    held, total = parameters_on_disk(matrices, found), sum(map(prod, dense.values()))
    return Audit(
        "checkpoint",
        source.name,
        parameters=held,
        dense_parameters=total,
        bytes=sum(file.stat().st_size for file in weights.files),
        dense_bytes=total * getattr(torch, weights.dtype).itemsize,
        sublayers=rows,
        provenance=made,
        problems=problems,
        table={**provenance_table(made), "storage": storage, **_numbers(layout, rows)},
        active=active_on_disk(rows, held, total, experts_per_token(source.config)),
    )


def _numbers(layout: Layout, rows: Iterable[Row]) -> dict[str, str]:
    if not layout.bits:
        return {}
    left = "; experts are not quantized" if any(is_stack(row.shape) for row in rows) else ""
    return {"quantization": layout.line() + left}


def _is_copy(model: PreTrainedModel, name: str, found: dict[str, tuple[int, ...]]) -> bool:
    """Return whether a tensor is a copy of another, such as a tied output head, and not stored."""
    copies = {(tied_names(model) or ("",))[0], *shared_tensors(model)}
    return name not in found and name in copies


def _name_problems(
    sublayers: list[Sublayer],
    ranks: dict[str, int],
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> list[str]:
    """Find ranks and tensors that do not belong to the model."""
    known = {s.name for s in sublayers}
    problems = [
        f"{name}: has a rank in config.json, but is not a linear layer of the model."
        for name in ranks
        if name not in known
    ]
    return problems + [f"{name}: not part of the model." for name in found if name not in expected]


def _record_problems(checkpoint: Checkpoint, rows: Iterable[Row]) -> list[str]:
    """Compare ranks on disk with the plan, and find records that are missing."""
    problems = []
    if (checkpoint.folder / PLAN_FILE).is_file():
        problems += plan_file_problems(checkpoint.folder / PLAN_FILE, rows)
    else:
        problems.append(f"{PLAN_FILE} is missing: ranks cannot be checked against the plan.")
    return problems + provenance_problems(checkpoint.unchecked_provenance)


def _value_problems(weights: Weights, reporter: Reporter) -> list[str]:
    problems = []
    with reporter.stage("Reading tensors", len(weights.infos)) as step:
        for name in weights:
            try:
                problems += value_problems([(name, weights.read(name))])
            except (NumericalError, SourceError) as error:
                problems.append(error.message)
            step()
    return problems


def _audit_model(source: Source, check_values: bool, reporter: Reporter) -> Audit:
    model, sublayers, shapes = _skeleton(source)
    infos = source.weights.infos
    tell_notes(source, reporter)
    problems = []
    try:
        names = tensor_names(model, source)
    except HisvdError as error:
        problems.append(error.message)
        names = {name: name for name in shapes if name in infos}
    expected = {name: shapes[name] for name in names}
    info = source.weights.info
    problems += tensor_problems(expected, {n: info(stored).shape for n, stored in names.items()})
    if check_values:
        problems += _value_problems(source.weights, reporter)
    total = sum(map(prod, expected.values()))
    rows = rows_of(sublayers, {n: info(stored).dtype for n, stored in names.items()}, Layout())
    return Audit(
        "model",
        source.name,
        parameters=total,
        dense_parameters=total,
        bytes=sum(file.stat().st_size for file in source.weights.files),
        sublayers=rows,
        provenance={"revision": source.revision, "fingerprint": source.fingerprint},
        problems=problems,
        table={"architecture": ", ".join(source.config.architectures or ["?"])},
        active=active_on_disk(rows, total, total, experts_per_token(source.config)),
    )
