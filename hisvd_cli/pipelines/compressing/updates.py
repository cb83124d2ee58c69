"""Prepares the update of layers after the compression of earlier layers."""

from __future__ import annotations

import torch

from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.updating import Update
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.memory.bounds import place_update
from hisvd_cli.pipelines.samples import calibrated_dtype, calibration_sample
from hisvd_cli.utils.distributed import world
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.progress import Reporter


def prepare_update(
    resolved: Resolved, source: Source, found: Calibration, reporter: Reporter
) -> Update | None:
    """Return the update of the settings, on the text of the calibration; None without an update.

    Raises:
        UsageError: there is only one window, so that none can be held out to choose the damping.
        StaleArtifactError, DataError: the text cannot be drawn again.
        MemoryLimitError: the hidden states of two models do not fit into the memory limit.
    """
    knobs = resolved.settings.compress
    if knobs.update == "none":
        return None
    sample = world().agreed(lambda: calibration_sample(resolved, source, found, reporter))
    samples, seqlen = sample.tokens.shape
    if knobs.update_damping is None and samples < 2:
        raise UsageError(
            "`compress.update` chooses its damping on held-out windows, but there is only one "
            "window.",
            "Give `compress.update_damping`, or calibrate with more `calibration.samples`.",
        )
    work = place_update(resolved, source, reporter, (samples, seqlen))
    return Update(
        method=knobs.update,
        damping=knobs.update_damping,
        sample=sample,
        device=torch.device(work.device),
        dtype=calibrated_dtype(resolved, found),
        batch=work.batch,
        place=work.place,
    )
