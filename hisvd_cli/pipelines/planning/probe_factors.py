"""Full-rank factors for allocators that truncate sublayers of the running model."""

from __future__ import annotations

from torch import Tensor

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.methods import Decomposer
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.linalg.truncation import decomposing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.planning.methods import decomposer_needs
from hisvd_cli.utils.device import pick_device


class ProbeFactors:
    """Full-rank factors of a linear module at a time; the statistics of the last block are kept."""

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
        self._layers = {name: s.layer for s in anatomy.sublayers for name in s.members}
        self._calibration = calibration
        self._method = method
        self._needs = decomposer_needs(resolved.settings.compress)
        self._device = exact_device(pick_device(resolved.settings.model.device))
        self._known: tuple[int, dict[str, Statistics]] = (-1, {})

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return U ``[m, k]`` and V ``[k, n]`` of a linear module, k = min(m, n), best first."""
        layer = self._layers[name]
        if self._known[0] != layer:
            known = self._calibration.statistics(layer, self._needs, self._device)
            self._known = (layer, known)
        weight = self._source.weights.read(self._names[f"{name}.weight"]).to(self._device)
        with decomposing(name):
            return self._method(weight, self._known[1][name], min(weight.shape))
