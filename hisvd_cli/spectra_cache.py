"""Spectra of every sublayer, computed once and kept beside what they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hisvd_cli.calibrate import Calibration
from hisvd_cli.errors import SourceError
from hisvd_cli.paths import cache_root
from hisvd_cli.reporter import Reporter
from hisvd_cli.source import Source
from hisvd_cli.spectrum import Spectrum, weight_energy, whitened_energy
from hisvd_cli.sublayers import Sublayer
from hisvd_cli.tensorfile import read_tensors, write_tensors

_FILE = "spectra.safetensors"


def load_spectra(
    source: Source,
    sublayers: Sequence[Sublayer],
    names: dict[str, str],
    calibration: Calibration | None,
    device: torch.device,
    reporter: Reporter,
) -> list[Spectrum]:
    """Return a spectrum per sublayer, from the cache where it holds them.

    Args:
        source: the model.
        sublayers: all of them, in order.
        names: name of a tensor in the model → name on disk.
        calibration: where moments come from; None for spectra of the weights alone.
        device: where eigenvalues are computed.
        reporter: told of each block.
    """
    owner = calibration.folder if calibration else cache_root() / "weights" / source.fingerprint
    key = calibration.key if calibration else source.fingerprint
    path = owner / _FILE
    energies = _read(path, key)
    if any(f"{s.name}.weight" not in energies for s in sublayers):
        energies = _compute(source, sublayers, names, calibration, device, reporter)
        write_tensors(path, energies, {"key": key})
    return [
        Spectrum(
            s.name,
            s.cluster,
            s.shape,
            energies[f"{s.name}.{'whitened' if calibration else 'weight'}"],
            energies[f"{s.name}.weight"],
        )
        for s in sublayers
    ]


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        tensors, metadata = read_tensors(path, "")
    except SourceError:  # absent, or damaged: both mean computing it again
        return {}
    return tensors if metadata.get("key") == key else {}


def _compute(
    source: Source,
    sublayers: Sequence[Sublayer],
    names: dict[str, str],
    calibration: Calibration | None,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Tensor]:
    energies: dict[str, Tensor] = {}
    layers = sorted({s.layer for s in sublayers})
    with reporter.stage("Computing spectra", len(layers)) as step:
        for layer in layers:
            moments = calibration.moments(layer, device) if calibration else {}
            for s in (s for s in sublayers if s.layer == layer):
                weight = source.weights.read(names[f"{s.name}.weight"]).to(device)
                energies[f"{s.name}.weight"] = weight_energy(weight)
                if calibration:
                    energies[f"{s.name}.whitened"] = whitened_energy(weight, moments[s.name])
            step()
    return energies
