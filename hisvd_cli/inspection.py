"""Audit what is on disk, without running any of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from hisvd_cli.blocks import build_meta_model, decoder_blocks
from hisvd_cli.budget import full_rank
from hisvd_cli.calibrate import MANIFEST, Calibration, open_calibration
from hisvd_cli.checkpoint import PLAN_FILE, Checkpoint, is_checkpoint, open_checkpoint
from hisvd_cli.convert import load_pt
from hisvd_cli.errors import HisvdError, NumericalError, SourceError
from hisvd_cli.foreign import ForeignCheckpoint, find_pairs, read_foreign
from hisvd_cli.plan import Plan, load_plan, plan_from
from hisvd_cli.reporter import Reporter
from hisvd_cli.source import Source, open_source
from hisvd_cli.sublayers import Sublayer, find_sublayers
from hisvd_cli.tensorfile import TensorInfo
from hisvd_cli.weights import Weights

_PLAIN_GLOBALS = ("torch.", "collections.OrderedDict", "_codecs.encode")
_PICKLES = {".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True)
class Row:
    """One sublayer as found: ``rank`` is the full rank where it is dense."""

    name: str
    layer: int | None
    cluster: str
    shape: tuple[int, int]
    rank: int
    dense: bool
    dtype: str

    @property
    def parameters(self) -> int:
        """Parameters of the pair, or of the dense matrix."""
        m, n = self.shape
        return m * n if self.dense else self.rank * (m + n)


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        kind: checkpoint, pt, plan, calibration or model.
        parameters: of everything on disk; ``dense_parameters``: of the model before compression.
        bytes: on disk, of weights.
        problems: what is wrong, a line each.
        table: name → value, for a person.
    """

    kind: str
    target: str
    parameters: int
    dense_parameters: int
    bytes: int
    sublayers: list[Row]
    provenance: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    table: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Share kept of the sublayers, or None where there are none."""
        full = sum(row.shape[0] * row.shape[1] for row in self.sublayers)
        return sum(row.parameters for row in self.sublayers) / full if full else None

    @property
    def model_ratio(self) -> float | None:
        """Share kept of the whole model."""
        return self.parameters / self.dense_parameters if self.dense_parameters else None

    def document(self) -> dict[str, Any]:
        """Return the audit as JSON data."""
        return {
            "kind": self.kind,
            "ratio": self.ratio,
            "model_ratio": self.model_ratio,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "bytes": self.bytes,
            "sublayers": [asdict(row) for row in self.sublayers],
            "provenance": self.provenance,
            "problems": self.problems,
        }


def audit(
    target: str,
    revision: str | None,
    trust_remote_code: bool,
    check_values: bool,
    reporter: Reporter,
) -> Audit:
    """Find out what ``target`` is, and audit it.

    Args:
        target: path or model name.
        revision: of a model on the hub.
        trust_remote_code: for a model that ships its own code.
        check_values: read every tensor and look for values that are not finite.
        reporter: told of progress.

    Raises:
        SourceError: nothing there, or not readable at all.
    """
    path = Path(target).expanduser()
    if path.is_file() and path.suffix == ".json":
        return _audit_plan(target, load_plan(path), path.stat().st_size)
    if path.is_file() and path.suffix in _PICKLES:
        return _audit_pickle(target, path)
    if (path / MANIFEST).is_file():
        return _audit_calibration(target, path)
    if path.is_dir() and is_checkpoint(path):
        return _audit_checkpoint(target, open_checkpoint(path), check_values, reporter)
    source = open_source(target, revision, trust_remote_code)
    return _audit_model(source, check_values, reporter)


def _audit_plan(target: str, plan: Plan, size: int) -> Audit:
    rows = [Row(s.name, s.layer, s.cluster, s.shape, s.rank, s.dense, "") for s in plan.sublayers]
    total = (
        round((plan.full_parameters - plan.kept_parameters) / (1 - plan.model_ratio))
        if plan.model_ratio < 1
        else plan.full_parameters
    )
    return Audit(
        "plan",
        target,
        parameters=round(total * plan.model_ratio),
        dense_parameters=total,
        bytes=size,
        sublayers=rows,
        provenance={**plan.provenance, "settings": plan.settings},
        table={"allocator": plan.allocator, "model": plan.provenance["model"]["name"]},
    )


def _audit_calibration(target: str, folder: Path) -> Audit:
    calibration = open_calibration(folder)
    manifest = calibration.manifest
    problems: list[str] = []
    for path in sorted(folder.glob("block-*.safetensors")):
        problems += _moment_problems(calibration, int(path.stem.rpartition("-")[2]))
    data = manifest["data"]
    return Audit(
        "calibration",
        target,
        parameters=0,
        dense_parameters=0,
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        sublayers=[],
        provenance=manifest,
        problems=problems,
        table={
            "model": manifest["model"]["name"],
            "text": f"{data['dataset']} ({data['split']})",
            "tokens": f"{data['samples']} × {data['seqlen']} = {data['tokens']:,}",
            "seed": str(data["seed"]),
            "dtype": manifest["dtype"],
        },
    )


def _moment_problems(calibration: Calibration, layer: int) -> list[str]:
    try:
        moments = calibration.moments(layer)
    except HisvdError as error:
        return [error.message]
    return [
        f"{name}: moment is not finite."
        for name, moment in moments.items()
        if not bool(moment.matrix.isfinite().all())
    ]


def _skeleton(source: Source) -> tuple[list[Sublayer], dict[str, tuple[int, ...]]]:
    """Return the sublayers of the dense model, and name → shape of all its tensors (tied once)."""
    model = build_meta_model(source, compressed=True)
    prefix, layers = decoder_blocks(model)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        head = model.get_output_embeddings()
        tied = {f"{name}.weight" for name, module in model.named_modules() if module is head}
        shapes = {name: shape for name, shape in shapes.items() if name not in tied}
    return find_sublayers(prefix, list(layers)), shapes


def _audit_checkpoint(
    target: str, checkpoint: Checkpoint, check_values: bool, reporter: Reporter
) -> Audit:
    sublayers, shapes = _skeleton(Source(target, checkpoint.folder))
    infos = checkpoint.weights.infos
    problems = _tensor_problems(sublayers, shapes, checkpoint.ranks, infos)
    rows = _rows(sublayers, checkpoint.ranks, infos)
    path = checkpoint.folder / PLAN_FILE
    if path.is_file():
        problems += _plan_problems(load_plan(path), rows)
    else:
        problems.append(f"{PLAN_FILE} is missing: ranks cannot be compared with their plan.")
    if not checkpoint.provenance:
        problems.append("hisvd.json is missing: nothing says how this was made.")
    if check_values:
        problems += _value_problems(checkpoint.weights, reporter)
    made = checkpoint.provenance
    return Audit(
        "checkpoint",
        target,
        parameters=sum(prod(info.shape) for info in infos.values()),
        dense_parameters=sum(prod(shape) for shape in shapes.values()),
        bytes=sum(file.stat().st_size for file in checkpoint.weights.files),
        sublayers=rows,
        provenance=made,
        problems=problems,
        table=_provenance_table(made),
    )


def _provenance_table(made: Mapping[str, Any]) -> dict[str, str]:
    if not made:
        return {}
    table = {
        "made from": made["model"]["name"],
        "allocator": made["allocator"],
        "decomposer": made["decomposer"],
    }
    if made.get("calibration"):
        data = made["calibration"]["data"]
        table["calibration"] = f"{data['samples']} × {data['seqlen']} tokens of {data['dataset']}"
    return table


def _rows(
    sublayers: Iterable[Sublayer], ranks: Mapping[str, int], infos: Mapping[str, TensorInfo]
) -> list[Row]:
    rows = []
    for s in sublayers:
        info = infos.get(f"{s.name}.weight")
        rank = ranks.get(s.name)
        rows.append(
            Row(
                s.name,
                s.layer,
                s.cluster,
                s.shape,
                full_rank(s.shape) if rank is None else rank,
                rank is None,
                info.dtype if info else "",
            )
        )
    return rows


def _tensor_problems(
    sublayers: Iterable[Sublayer],
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    infos: Mapping[str, TensorInfo],
) -> list[str]:
    expected = dict(shapes)
    known = {s.name: s.shape for s in sublayers}
    problems = [
        f"{name}: config.json gives a rank, but it is no sublayer."
        for name in ranks
        if name not in known
    ]
    for name, rank in ranks.items():
        if name in known:
            m, n = known[name]
            expected[f"{name}.weight"] = (rank, n)
            expected[f"{name}.weight_u"] = (m, rank)
    for name, shape in expected.items():
        if name not in infos:
            problems.append(f"{name}: missing.")
        elif infos[name].shape != shape:
            problems.append(
                f"{name}: {list(infos[name].shape)} on disk, {list(shape)} by config.json."
            )
    problems += [f"{name}: not part of the model." for name in infos if name not in expected]
    return problems


def _plan_problems(plan: Plan, rows: Iterable[Row]) -> list[str]:
    found = {row.name: row for row in rows}
    problems = []
    for planned in plan.sublayers:
        row = found.get(planned.name)
        if row is None or (row.rank, row.parameters) != (planned.rank, planned.parameters):
            have = "absent" if row is None else f"rank {row.rank}"
            problems.append(f"{planned.name}: {have}, but the plan says rank {planned.rank}.")
    return problems


def _value_problems(weights: Weights, reporter: Reporter) -> list[str]:
    problems = []
    with reporter.stage("Reading tensors", len(weights.infos)) as step:
        for name in weights:
            try:
                weights.read(name)
            except NumericalError as error:
                problems.append(error.message)
            step()
    return problems


def _audit_model(source: Source, check_values: bool, reporter: Reporter) -> Audit:
    sublayers, shapes = _skeleton(source)
    total = sum(prod(shape) for shape in shapes.values())
    problems = _value_problems(source.weights, reporter) if check_values else []
    return Audit(
        "model",
        source.name,
        parameters=total,
        dense_parameters=total,
        bytes=sum(file.stat().st_size for file in source.weights.files),
        sublayers=_rows(sublayers, {}, source.weights.infos),
        provenance={"revision": source.revision, "fingerprint": source.fingerprint},
        problems=problems,
        table={"architecture": ", ".join(source.config.architectures or ["?"])},
    )


def _audit_pickle(target: str, path: Path) -> Audit:
    """Audit a pickle: first without running a thing, then, where it names nothing but tensors and
    is one of ours, its config and provenance as well."""
    found = read_foreign(path)
    if not found.classes and all(g.startswith(_PLAIN_GLOBALS) for g in found.globals_seen):
        try:
            return _audit_own_pt(target, path, load_pt(path))
        except SourceError:
            pass  # a plain state dict, which the foreign audit below describes
    return _audit_foreign(target, found)


def _audit_own_pt(target: str, path: Path, document: Mapping[str, Any]) -> Audit:
    config = document["config"]
    tensors = document["tensors"]
    infos = {
        name: TensorInfo(
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            0,
            t.numel() * t.element_size(),
        )
        for name, t in tensors.items()
    }
    ranks = dict(config["quantization_config"]["ranks"])
    plan = plan_from(json.loads(document["files"][PLAN_FILE].numpy().tobytes()))
    sublayers = [Sublayer(s.name, s.layer, s.cluster, s.shape) for s in plan.sublayers]
    rows = _rows(sublayers, ranks, infos)
    problems = _plan_problems(plan, rows)
    problems += [
        f"{name}: holds values that are not finite."
        for name, t in tensors.items()
        if not bool(t.isfinite().all())
    ]
    kept = sum(prod(info.shape) for info in infos.values())
    saved = sum(prod(row.shape) - row.parameters for row in rows)
    return Audit(
        "pt",
        target,
        parameters=kept,
        dense_parameters=kept + saved,
        bytes=path.stat().st_size,
        sublayers=rows,
        provenance=document["provenance"],
        problems=problems,
        table=_provenance_table(document["provenance"]),
    )


def _audit_foreign(target: str, found: ForeignCheckpoint) -> Audit:
    pairs, dense = find_pairs(found)
    rows = [Row(p.name, p.layer, p.cluster, p.shape, p.rank, False, p.dtype) for p in pairs]
    for tensor in dense:
        m, n = tensor.shape
        name = tensor.name.removesuffix(".weight")
        rows.append(
            Row(
                name,
                _layer_of(name),
                name.rpartition(".")[2],
                (m, n),
                min(m, n),
                True,
                tensor.dtype,
            )
        )
    rows.sort(key=lambda row: (-1 if row.layer is None else row.layer, row.name))
    held = sum(prod(tensor.shape) for tensor in found.tensors.values())
    saved = sum(prod(row.shape) - row.parameters for row in rows)
    classes = sorted(set(found.classes.values()))
    return Audit(
        "pt",
        target,
        parameters=held,
        dense_parameters=held + saved,
        bytes=found.file_bytes,
        sublayers=rows,
        provenance={"classes": classes, "globals": list(found.globals_seen)},
        problems=list(found.problems),
        table={
            "format": "pickle of another tool; read without running anything in it",
            "tensors": f"{len(found.tensors)} of {found.tensor_bytes:,} bytes",
            "classes": ", ".join(classes[:6]) or "none: a plain state dict",
        },
    )


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
