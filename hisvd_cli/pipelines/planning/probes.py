"""Opens the model for allocators that run it."""

from __future__ import annotations

from functools import partial

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.probe import ModelProbe
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.methods import DECOMPOSERS
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.methods import decomposer_knobs, measures
from hisvd_cli.pipelines.planning.probe_factors import ProbeFactors
from hisvd_cli.pipelines.samples import calibrated_dtype, calibration_sample
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.registry import flattened

_STORE = "measured.json"


def open_probe(
    resolved: Resolved,
    source: Source,
    anatomy: Anatomy,
    calibration: Calibration | None,
    reporter: Reporter,
) -> ModelProbe | None:
    """Return the probe for the allocators of the settings that run the model, None if none does.

    Raises:
        SourceError: there is no calibration to truncate by.
        StaleArtifactError, DataError: the calibration text cannot be drawn again.
    """
    names = [name for name in resolved.settings.plan.allocator if measures(name)]
    if not names:
        return None
    if calibration is None:
        raise SourceError(
            f"The allocator '{names[0]}' needs a calibration, and there is none.",
            "Run: hisvd calibrate",
        )
    sample = calibration_sample(resolved, source, calibration, reporter)
    knobs = resolved.settings.plan
    windows = sample.tokens[: knobs.probe_samples]
    decomposer = resolved.settings.compress.decomposer
    method = DECOMPOSERS.get(decomposer)
    used = DECOMPOSERS.arguments(decomposer, decomposer_knobs(resolved.settings))
    dtype = calibrated_dtype(resolved, calibration)
    chosen = select(anatomy.sublayers, knobs.include, knobs.exclude)
    return ModelProbe(
        source,
        {s.name: s.members for s in chosen},
        windows,
        ProbeFactors(resolved, source, anatomy, calibration, partial(method, **used)).of,
        device=pick_device(resolved.settings.model.device),
        dtype=dtype,
        store=calibration.folder / _STORE,
        key=digest(
            calibration.key,
            calibration.gradients_key,
            decomposer,
            repr(flattened(used)),
            f"{len(windows)} {dtype}",
        ),
        reporter=reporter,
    )
