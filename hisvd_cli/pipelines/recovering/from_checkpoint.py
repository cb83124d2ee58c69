"""Fine-tunes an existing checkpoint into another folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hisvd_cli.inspection.audit import part
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.output_names import inputs_of
from hisvd_cli.pipelines.outputs import check_output, peak_memory, refuse_flags
from hisvd_cli.pipelines.recovering.recovery import prepare_recovery
from hisvd_cli.pipelines.recovering.training import run_recovery, schedule_of
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.progress import Reporter


def recover_checkpoint(
    resolved: Resolved, folder: Path, output: Path | None, overwrite: bool, reporter: Reporter
) -> dict[str, Any]:
    """Fine-tune an existing checkpoint; return the result as JSON data.

    Raises:
        HisvdError: see :func:`prepare_recovery`; nothing is written then.
    """
    path = _checked_output(resolved, folder, output, overwrite)
    started = time.monotonic()
    recovery = prepare_recovery(resolved, folder, reporter)
    # Check again: the output may have come to exist while text was sampled.
    check_output(path, overwrite, _inputs(resolved, folder))
    made = run_recovery(recovery, path, reporter)
    return {
        "output": str(path),
        "from": str(folder),
        "bytes": made.bytes,
        "seconds": {"recover": time.monotonic() - started},
        "peak_memory_bytes": peak_memory(),
        **recovery_document(path),
    }


def forecast_recovery(
    resolved: Resolved, folder: Path, output: Path | None, overwrite: bool, reporter: Reporter
) -> dict[str, Any]:
    """Return what a recovery would train on, and its time limit if there is one.

    Raises:
        HisvdError: any error that would stop the real run before its work.
    """
    path = _checked_output(resolved, folder, output, overwrite)
    recovery = prepare_recovery(resolved, folder, reporter)
    schedule, parts = schedule_of(recovery), 2 if recovery.knobs.method == "lora" else 1
    return {
        "output": str(path),
        "from": str(folder),
        "bytes": recovery.student.weights.total_bytes,
        "text_tokens": recovery.data.tokens,
        "tokens": schedule.tokens and schedule.tokens * parts,
        "seconds": schedule.seconds and schedule.seconds * parts,
    }


def _checked_output(resolved: Resolved, folder: Path, output: Path | None, overwrite: bool) -> Path:
    """Return the path of the new checkpoint. Raises UsageError, OutputError."""
    given = "the checkpoint that `from` names"
    refuse_flags(resolved, "plan", given, "compress the model again")
    refuse_flags(resolved, "compress", given, "compress the model again", but=("max_shard_size",))
    refuse_flags(resolved, "quantize", given, "quantize the result with: hisvd convert")
    named = folder if folder.name not in ("", "..") else folder.resolve()
    path = output or named.with_name(f"{named.name}-{resolved.settings.recover.method}")
    if path.suffix == ".pt":
        raise UsageError(
            f"`from` writes a folder, not the file {path}.",
            "Name a folder, then make a single file of it with: hisvd convert",
        )
    check_output(path, overwrite, _inputs(resolved, folder))
    return path


def _inputs(resolved: Resolved, folder: Path) -> list[Path]:
    """Return the inputs of a recovery, with the dense model. Raises SourceError."""
    made = part(open_checkpoint(folder).provenance, "model")
    return inputs_of(resolved, folder, str(made.get("name") or ""))


def recovery_document(folder: Path) -> dict[str, Any]:
    """Return the recovery in a checkpoint's provenance, as JSON data."""
    made = part(open_checkpoint(folder).provenance, "recovery")
    names = ("method", "steps", "tokens", "before", "best", "stopped")
    return {"recovery": {name: made.get(name) for name in names}}
