"""Spectra of all sublayers, cached beside the calibration or model that they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.allocation.energies import (
    component_changes,
    fisher_energy,
    held_out_fisher_energy,
    weight_energy,
    whitened_energy,
)
from hisvd_cli.allocation.estimate import decomposition_cost
from hisvd_cli.allocation.rounding_noise import Round, Rounding, diagonals, rounding
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.calibration.store import GRADIENTS, Calibration
from hisvd_cli.linalg.statistics import Need, Statistics, missing, required
from hisvd_cli.linalg.truncation import decomposing
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import Sublayer
from hisvd_cli.utils.distributed import share_by_cost, world
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.checksums import intact
from hisvd_cli.utils.files.fingerprints import cache_root, digest
from hisvd_cli.utils.files.tensorfile import AGAIN, read_tensors, write_tensors
from hisvd_cli.utils.prefetch import ahead
from hisvd_cli.utils.progress import Reporter

Compute = Callable[[Tensor, Statistics], Tensor]


@dataclass(frozen=True)
class Wanted:
    """The spectra that a plan needs.

    Attributes:
        metric: metric of the loss: whitened, fisher, held-out (fisher on held-out text) or weight.
            Without a calibration, whitened means weight.
        weights: whether it also needs the spectra of the weights.
        changes: whether it also needs the signed change for each component.
        input_shrinkage: shrinkage of the fisher metric.
        output_shrinkage: shrinkage of the fisher metric.
    """

    metric: str = "whitened"
    weights: bool = True
    changes: bool = False
    input_shrinkage: float = 0.0
    output_shrinkage: float = 0.0


@dataclass(frozen=True)
class SpectraSource:
    """The inputs of spectra.

    Attributes:
        source: the model.
        sublayers: the sublayers, in order.
        names: name of a tensor in the model → name on disk.
        calibration: the statistics; None for spectra of the weights alone.
        device: device for eigenvalues.
    """

    source: Source
    sublayers: Sequence[Sublayer]
    names: dict[str, str]
    calibration: Calibration | None
    device: torch.device


def load_spectra(of: SpectraSource, wanted: Wanted, reporter: Reporter) -> list[Spectrum]:
    """Return a spectrum per sublayer, from the cache if possible.

    Raises:
        SourceError: statistics that the metric needs are missing; names the command.
    """
    plain = of.calibration is None or wanted.metric == "weight"
    weights = _weights(of, reporter) if plain or wanted.weights else dict[str, Tensor]()
    energies, changes, importance = weights, dict[str, Tensor](), dict[int, float]()
    if of.calibration is None:
        if wanted.metric not in ("whitened", "weight"):
            raise missing(wanted.metric, "gradients")
        if wanted.changes:
            raise missing("zero-sum", "weight-gradients")
    else:
        layers = {s.layer for s in of.sublayers}
        importance = {layer: of.calibration.importance(layer) for layer in layers}
        if wanted.metric == "whitened":
            energies = _whitened(of, of.calibration, reporter)
        elif wanted.metric != "weight":
            energies = _fisher(of, of.calibration, wanted, reporter)
        if wanted.changes:
            changes = _changes(of, of.calibration, reporter)
    return [
        Spectrum(
            name=s.name,
            cluster=s.cluster,
            shape=s.shape,
            energy=energies[s.name],
            weight_energy=weights.get(s.name),
            layer=s.layer,
            importance=importance.get(s.layer),
            changes=changes.get(s.name),
        )
        for s in of.sublayers
    ]


def load_roundings(
    of: SpectraSource,
    wanted: Wanted,
    methods: Mapping[int, Round],
    method_key: str,
    reporter: Reporter,
) -> dict[str, dict[int, Rounding]]:
    """Return sublayer → bits → effect of rounding the weight, from the cache if possible.

    Args:
        of: the model and its statistics.
        wanted: the metric and its shrinkage.
        methods: bits → rounding function.
        method_key: name of the rounding method in the cache.
        reporter: shows progress.

    Raises:
        SourceError: statistics that the metric needs are missing.
    """
    calibration = of.calibration
    metric = wanted.metric if calibration else "weight"
    fisher = metric in ("fisher", "held-out")
    need: Need | None = None if metric == "weight" else "gradients" if fisher else "moments"
    shrinkage = (wanted.input_shrinkage, wanted.output_shrinkage) if fisher else (0.0, 0.0)

    def compute(weight: Tensor, statistics: Statistics) -> Tensor:
        weights = diagonals(metric, len(weight), statistics, *shrinkage)
        found = [rounding(weight, method, weights) for method in methods.values()]
        return torch.tensor([[each.noise, each.loss] for each in found], dtype=torch.float64)

    folder = cache_root() / "weights" / of.source.fingerprint
    key = of.source.fingerprint
    if calibration and need:
        key = calibration.gradients_key if fisher else calibration.key
        folder = calibration.folder / GRADIENTS if fisher else calibration.folder
    key = digest(key, metric if need else "weight", repr(shrinkage), method_key)
    values = _cached(of, folder / f"rounding-{key[:12]}.safetensors", key, need, compute, reporter)
    return {
        s.name: {
            bits: Rounding(*pair)
            for bits, pair in zip(methods, values[s.name].tolist(), strict=True)
        }
        for s in of.sublayers
    }


def _weights(of: SpectraSource, reporter: Reporter) -> dict[str, Tensor]:
    """Return the spectra of the weights, which all calibrations of a model share."""
    path = cache_root() / "weights" / of.source.fingerprint / "spectra.safetensors"

    def compute(weight: Tensor, _statistics: Statistics) -> Tensor:
        return weight_energy(weight)

    return _cached(of, path, of.source.fingerprint, None, compute, reporter)


def _whitened(of: SpectraSource, calibration: Calibration, reporter: Reporter) -> dict[str, Tensor]:
    def compute(weight: Tensor, statistics: Statistics) -> Tensor:
        return whitened_energy(weight, required(statistics.moment, "whitened", "moments"))

    path = calibration.folder / "spectra.safetensors"
    return _cached(of, path, calibration.key, "moments", compute, reporter)


def _fisher(
    of: SpectraSource, calibration: Calibration, wanted: Wanted, reporter: Reporter
) -> dict[str, Tensor]:
    shrinkage = (wanted.input_shrinkage, wanted.output_shrinkage)

    def compute(weight: Tensor, statistics: Statistics) -> Tensor:
        if wanted.metric == "held-out" and statistics.halves:
            return held_out_fisher_energy(weight, statistics, *shrinkage)
        return fisher_energy(weight, statistics, *shrinkage)

    calibration.require({"gradients"}, wanted.metric)
    key = digest(calibration.gradients_key, wanted.metric, repr(shrinkage))
    path = calibration.folder / GRADIENTS / f"spectra-{key[:12]}.safetensors"
    return _cached(of, path, key, "gradients", compute, reporter)


def _changes(of: SpectraSource, calibration: Calibration, reporter: Reporter) -> dict[str, Tensor]:
    calibration.require({"weight-gradients"}, "zero-sum")
    path = calibration.folder / GRADIENTS / "changes.safetensors"
    key = calibration.gradients_key
    return _cached(of, path, key, "weight-gradients", component_changes, reporter)


def _cached(
    of: SpectraSource,
    path: Path,
    key: str,
    need: Need | None,
    compute: Compute,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """Return a value per sublayer from ``path`` if it has this ``key``; otherwise compute it from
    weights and, with a ``need``, statistics. Several processes share the work."""
    here = world()
    values = here.agreed(lambda: _read(path, key))
    lacking = [s for s in of.sublayers if s.name not in values]
    if not lacking:
        return values
    blocks: dict[int, list[Sublayer]] = {}
    for s in lacking:
        blocks.setdefault(s.layer, []).append(s)
    costs = [[(s.name, decomposition_cost(s.shape)) for s in block] for block in blocks.values()]
    owner = share_by_cost(costs, here.size)
    own = [s for block in blocks.values() for s in block if owner[s.name] == here.rank]

    def gather(linear: tuple[Sublayer, str]) -> tuple[Tensor, Statistics]:
        s, name = linear
        known: dict[str, Statistics] = {}
        if of.calibration and need:
            known = of.calibration.statistics(s.layer, {need}, of.device, {name})
        weight = of.source.weights.read(of.names[f"{name}.weight"])
        return weight, known.get(name, Statistics())

    mine: dict[str, Tensor] = {}
    linears = [(s, name) for s in own for name in s.members]
    with reporter.stage("Computing spectra", len(linears)) as step:
        for (s, name), (weight, statistics) in ahead(gather, linears):
            with decomposing(name):
                value = compute(weight.to(of.device), statistics).cpu()
            # One rank serves all experts of a stack, so that their losses add up by rank.
            mine[s.name] = mine[s.name] + value if s.name in mine else value
            step()
    for part in here.gathered(mine):
        values |= part
    if here.first:
        with suppress(OutputError):  # the cache is optional
            write_tensors(path, values, {"key": key})
    return values


def _read(path: Path, key: str) -> dict[str, Tensor]:
    if not intact(path):  # missing or damaged
        return {}
    tensors, metadata = read_tensors(path, AGAIN)
    return tensors if metadata.get("key") == key else {}
