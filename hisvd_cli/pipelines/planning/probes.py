"""Settings ─► the model as allocators measure it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from hisvd_cli.allocation.probe import ModelProbe
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.methods import DECOMPOSERS, Decomposer
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.linalg.truncation import decomposing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sublayers import select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.methods import decomposer_knobs, decomposer_needs, measures
from hisvd_cli.pipelines.samples import calibrated_dtype, calibration_sample
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.fingerprints import digest
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.registry import accepted

if TYPE_CHECKING:
    from hisvd_cli.allocation.anatomy import Anatomy

_STORE = "measured.json"


def open_probe(
    resolved: Resolved,
    source: Source,
    anatomy: Anatomy,
    calibration: Calibration | None,
    reporter: Reporter,
) -> ModelProbe | None:
    """Return the model for the allocators of the settings that measure it, None if none does.

    Raises:
        SourceError: there is no calibration to truncate by.
        StaleArtifactError, DataError: its text cannot be drawn again.
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
    used = accepted(method, decomposer_knobs(resolved.settings))
    dtype = calibrated_dtype(resolved, calibration)
    chosen = select(anatomy.sublayers, knobs.include, knobs.exclude)
    return ModelProbe(
        source,
        [s.name for s in chosen],
        windows,
        _Factors(resolved, source, anatomy, calibration, partial(method, **used)).of,
        device=pick_device(resolved.settings.model.device),
        dtype=dtype,
        store=calibration.folder / _STORE,
        key=digest(
            calibration.key,
            calibration.gradients_key,
            decomposer,
            repr(used),
            f"{len(windows)} {dtype}",
        ),
        reporter=reporter,
    )


class _Factors:
    """Full-rank factors of one sublayer at a time; the statistics of the last block are kept."""

    def __init__(
        self,
        resolved: Resolved,
        source: Source,
        anatomy: Anatomy,
        calibration: Calibration,
        method: Decomposer,
    ) -> None:
        self._source = source
        self._names = anatomy.names
        self._layers = {s.name: s.layer for s in anatomy.sublayers}
        self._calibration = calibration
        self._method = method
        self._needs = decomposer_needs(resolved.settings.compress)
        self._device = exact_device(pick_device(resolved.settings.model.device))
        self._known: tuple[int, dict[str, Statistics]] = (-1, {})

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return U ``[m, k]`` and V ``[k, n]`` of a sublayer, k = min(m, n), best first."""
        layer = self._layers[name]
        if self._known[0] != layer:
            known = self._calibration.statistics(layer, self._needs, self._device)
            self._known = (layer, known)
        weight = self._source.weights.read(self._names[f"{name}.weight"]).to(self._device)
        with decomposing(name):
            return self._method(weight, self._known[1][name], min(weight.shape))
