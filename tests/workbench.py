"""The demo model, calibrated and planned through the library, for tests of what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.factorize import Compressed, compress
from hisvd_cli.export.model_card import write_card
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.calibration import ensure_calibration
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.planning.methods import decomposer_knobs, decomposer_needs, plan_needs
from hisvd_cli.pipelines.planning.plans import make_plans
from hisvd_cli.utils.progress import Silent

Bench = tuple[Resolved, Source, Calibration]


def bench(folder: Path, *overrides: str) -> Bench:
    """Return settings, the demo model, and its calibration in ``folder``."""
    flags = {
        ("model", "name"): "demo",
        ("model", "dtype"): "float32",
        ("calibration", "samples"): 12,
        ("calibration", "seqlen"): 128,
        ("calibration", "path"): str(folder / "calibration"),
    }
    resolved = resolve(flags, overrides=overrides, environ={}, start=folder)
    source = named_source(resolved)
    needs = plan_needs(resolved.settings) | decomposer_needs(resolved.settings.compress)
    calibration, _ = ensure_calibration(resolved, source, Silent(), needs=needs)
    return resolved, source, calibration


def plan_at(made: Bench, ratio: float) -> Plan:
    """Return the plan of the bench's settings at one ratio."""
    resolved, source, calibration = made
    return make_plans(resolved, source, calibration, Silent(), [ratio])[0]


def compress_to(made: Bench, plan: Plan, output: Path, shard_bytes: int = 10**9) -> Compressed:
    """Compress the bench's model by a plan."""
    resolved, source, calibration = made
    return compress(
        source,
        plan,
        calibration,
        output,
        decomposer=resolved.settings.compress.decomposer,
        knobs=decomposer_knobs(resolved.settings),
        needs=decomposer_needs(resolved.settings.compress),
        device=torch.device("cpu"),
        shard_bytes=shard_bytes,
        settings=resolved.recorded("model", "calibration", "plan", "compress"),
        describe=lambda home, record: write_card(home, source, plan, record),
        reporter=Silent(),
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_below(folders: Sequence[Path]) -> set[str]:
    """Return the names of all entries directly in ``folders``."""
    return {path.name for folder in folders for path in folder.iterdir()}
