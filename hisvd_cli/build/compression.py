"""Settings ─► a compressed checkpoint, and everything that it needs on the way."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hisvd_cli.build.calibration import (
    default_dataset,
    ensure_calibration,
    find_calibration,
    named_source,
    request_calibration,
)
from hisvd_cli.build.evaluation import measure
from hisvd_cli.build.plans import dissect, make_plans
from hisvd_cli.calibrate import Calibration
from hisvd_cli.checkpoint import PLAN_FILE, PROVENANCE, is_checkpoint, open_checkpoint
from hisvd_cli.compress import Compressed, compress, lay_out
from hisvd_cli.convert import to_pt
from hisvd_cli.decompose import DECOMPOSERS
from hisvd_cli.device import pick_device
from hisvd_cli.errors import OutputError, UsageError
from hisvd_cli.estimate import estimate_calibration, estimate_decomposition
from hisvd_cli.evaluate import PerplexityResult
from hisvd_cli.paths import slug
from hisvd_cli.plan import Plan, load_plan
from hisvd_cli.profile import Resolved
from hisvd_cli.reporter import Reporter
from hisvd_cli.source import Source


@dataclass(frozen=True)
class Outcome:
    """A finished compression.

    ``perplexity`` is (before, after) where it was measured; ``plan_path`` a file that holds the
    plan.
    """

    output: Path
    plan: Plan
    plan_path: Path
    bytes: int
    dense_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    perplexity: tuple[PerplexityResult, PerplexityResult] | None = None

    def document(self) -> dict[str, Any]:
        """Return the outcome as JSON data."""
        measured = self.perplexity
        return {
            "output": str(self.output),
            "ratio": self.plan.ratio,
            "model_ratio": self.plan.model_ratio,
            "kept_parameters": self.plan.kept_parameters,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "plan": str(self.plan_path),
            "perplexity": None
            if measured is None
            else {"before": measured[0].perplexity, "after": measured[1].perplexity},
        }


def output_path(resolved: Resolved, output: Path | None) -> Path:
    """Return where the checkpoint goes: as named, else ``MODEL-RATIO`` in the current folder."""
    if output is not None:
        return output
    return Path(f"{slug(resolved.settings.model.name)}-{resolved.settings.plan.ratio[0]:g}")


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way, before any work.

    ``--overwrite`` only ever replaces what hisvd wrote.

    Raises:
        OutputError: something stands there.
    """
    if path.suffix == ".pt":
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError(f"{path} exists.", "Pass --overwrite, or name another --output.")
        return
    if path.is_file():
        raise OutputError(f"{path} is a file.", "Name a folder, or a file that ends in .pt.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"The folder {path} is not empty.", "Pass --overwrite, or name another --output."
        )
    if not is_checkpoint(path) and not (path / PROVENANCE).is_file():
        raise OutputError(
            f"The folder {path} holds something that hisvd did not write.",
            "Name another --output, or remove the folder yourself.",
        )


def compress_model(
    resolved: Resolved,
    output: Path | None,
    plan_file: Path | None,
    overwrite: bool,
    reporter: Reporter,
) -> Outcome:
    """Calibrate, plan and compress, reusing what is there.

    Raises:
        UsageError: several ratios, or an unknown method.
        OutputError: something stands at the output.
    """
    if len(resolved.settings.plan.ratio) > 1 and plan_file is None:
        raise UsageError("compress takes one --ratio.", "Run it once per ratio.")
    DECOMPOSERS.get(resolved.settings.compress.decomposer)
    source = named_source(resolved)
    plan = load_plan(plan_file) if plan_file else None
    path = output or output_path(resolved, None)
    check_output(path, overwrite)
    calibration, calibrating = ensure_calibration(resolved, source, reporter)
    started = time.monotonic()
    plan = plan or make_plans(resolved, source, calibration, reporter)[0]
    planning = time.monotonic() - started
    made, plan_path = _write(resolved, source, plan, calibration, path, reporter)
    seconds = {
        "calibrate": calibrating,
        "plan": planning,
        "decompose": made.decompose_seconds,
        "write": made.write_seconds,
    }
    return Outcome(
        output=path,
        plan=plan,
        plan_path=plan_path,
        bytes=made.bytes,
        dense_bytes=source.weights.total_bytes,
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
        perplexity=_before_and_after(resolved, source, path, reporter),
    )


def _write(
    resolved: Resolved,
    source: Source,
    plan: Plan,
    calibration: Calibration,
    path: Path,
    reporter: Reporter,
) -> tuple[Compressed, Path]:
    knobs = resolved.settings.compress
    single = path.suffix == ".pt"
    folder = path.with_name(f".{path.name}.folder") if single else path
    made = compress(
        source,
        plan,
        calibration,
        folder,
        decomposer=knobs.decomposer,
        device=pick_device(resolved.settings.model.device),
        shard_bytes=int(knobs.max_shard_size * 1e9),
        settings=resolved.recorded(),
        reporter=reporter,
    )
    if not single:
        return made, path / PLAN_FILE
    to_pt(open_checkpoint(folder), path)
    plan_path = path.with_suffix(".plan.json")
    plan.save(plan_path)
    shutil.rmtree(folder)
    size = path.stat().st_size
    return Compressed(path, size, made.decompose_seconds, made.write_seconds), plan_path


def _before_and_after(
    resolved: Resolved, source: Source, path: Path, reporter: Reporter
) -> tuple[PerplexityResult, PerplexityResult] | None:
    wanted = resolved.settings.compress.evaluate
    if wanted is False or (wanted is None and default_dataset(source) != source.name):
        return None
    before = measure(resolved, source.name, reporter, source=source)[0]
    return before, measure(resolved, str(path), reporter, dataset_of=source)[0]


def peak_memory() -> int:
    """Return the process's peak memory in bytes: resident, plus what CUDA allocated."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def estimate_model(
    resolved: Resolved, output: Path | None, plan_file: Path | None, reporter: Reporter
) -> dict[str, Any]:
    """Return what a compression would take: bytes, memory, seconds. Does no work."""
    source = named_source(resolved)
    plan = load_plan(plan_file) if plan_file else None
    knobs = resolved.settings.plan
    anatomy = dissect(source)
    full = sum(s.shape[0] * s.shape[1] for s in anatomy.sublayers)
    each = source.weights.total_bytes / anatomy.total_parameters
    ratio = plan.ratio if plan else knobs.ratio[0]
    kept = plan.kept_parameters if plan else int(ratio * full)
    size = (
        lay_out(source, plan.ranks).total_bytes
        if plan
        else int(source.weights.total_bytes - (full - kept) * each)
    )
    found = find_calibration(resolved, source, reporter)
    request = request_calibration(resolved, source)
    calibrating = estimate_calibration(source, request, resolved.settings.calibration.batch)
    decomposing = estimate_decomposition(anatomy.sublayers)
    stages = {"calibrate": 0.0 if found else calibrating["seconds"], "decompose": decomposing}
    return {
        "output": str(output or output_path(resolved, None)),
        "ratio": ratio,
        "bytes": size,
        "dense_bytes": source.weights.total_bytes,
        "calibration_bytes": 0 if found else calibrating["bytes"],
        "peak_memory_bytes": calibrating["peak_memory_bytes"],
        "stages": stages,
        "seconds": sum(stages.values()),
    }
