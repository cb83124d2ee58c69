"""Turns a finished checkpoint folder into one ``.pt`` file."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from hisvd_cli.allocation.plan import Plan, load_plan
from hisvd_cli.compression.factorize import Compressed
from hisvd_cli.export.convert import to_pt
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.pipelines.outputs import plan_beside


def write_single_file(made: Compressed, plan: Plan, path: Path) -> Compressed:
    """Write the checkpoint folder of ``made`` as a file, with its plan beside it, and remove the
    folder."""
    started = time.monotonic()
    to_pt(open_checkpoint(made.output), path)
    beside = plan_beside(path)
    if not beside.exists() or load_plan(beside) != plan:  # it may be the plan that was given
        plan.save(beside)
    shutil.rmtree(made.output)
    writing = made.write_seconds + time.monotonic() - started
    return replace(made, output=path, bytes=path.stat().st_size, write_seconds=writing)
