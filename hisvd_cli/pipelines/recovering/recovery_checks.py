"""Checks of fine-tuning before a compression."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hisvd_cli.calibration.text.tokens import check_seqlen
from hisvd_cli.finetuning.adaptation import check_peft
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.whole_models import check_training, check_writing
from hisvd_cli.pipelines.recovering.recovery_texts import limited, load_text_of, named_text
from hisvd_cli.pipelines.samples import SELF, stored_dtype
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import UsageError

_TOGETHER = 2048  # tokens per forward pass


def wants_recovery(resolved: Resolved) -> bool:
    """Return whether the settings request fine-tuning."""
    return resolved.settings.recover.method != "none"


def check_recovery(resolved: Resolved, dense: Source) -> None:
    """Check before a compression that the recovery after it can run.

    Raises:
        UsageError: there are several processes, or a library is missing.
        DataError: the text is missing, too short, or lacks a field.
    """
    check_runs(resolved)
    check_seqlen(resolved.settings.recover.seqlen, dense, "`recover.seqlen`")
    calibrated = resolved.settings.calibration
    # Without a named text it is that of the calibration, which may not exist yet.
    dataset = named_text(resolved) or SELF
    if dataset != SELF:
        limited(load_text_of(dataset, dense, resolved, calibrated.drop), resolved)
    teacher = dense if resolved.settings.recover.method == "distill" else None
    dtype = training_dtype(resolved, stored_dtype(dense))
    check_training(resolved, (dense, teacher), dtype, tokens_together(resolved))
    if dataset == SELF:
        section = "calibration" if resolved.settings.recover.dataset == "auto" else "recover"
        reason = f"`{section}.dataset={SELF}`"
        check_writing(resolved, dense, resolved.settings.recover.seqlen, reason)


def check_trains(ranks: Mapping[str, int], resolved: Resolved) -> None:
    """Raise UsageError if no layer is low-rank, so that there is nothing to train."""
    if not ranks:
        raise UsageError(
            f"`recover.method` {resolved.settings.recover.method} trains low-rank layers, but at "
            "this ratio every layer stays dense.",
            "Lower `plan.ratio`, or leave out `recover.method`.",
        )


def check_runs(resolved: Resolved) -> None:
    """Raise UsageError if the method cannot run: several processes, or a library is missing."""
    if world().size > 1:
        raise UsageError(
            "`recover.method` runs in one process only.",
            "Compress with several processes, then run in one: "
            "hisvd compress --from CHECKPOINT --recover distill",
        )
    if resolved.settings.recover.method == "lora":
        check_peft()


def training_dtype(resolved: Resolved, stored: str) -> torch.dtype:
    """Return the dtype of the forward and backward passes."""
    device = pick_device(resolved.settings.model.device)
    dtype = pick_dtype(resolved.settings.model.dtype, stored, device)
    if dtype == torch.float16:  # its gradients underflow
        return pick_dtype("auto", "bfloat16", device)
    return dtype


def tokens_together(resolved: Resolved) -> tuple[int, int]:
    """Return the number of windows per pass, and the tokens in each."""
    seqlen = resolved.settings.recover.seqlen
    return max(_TOGETHER // seqlen, 1), seqlen
