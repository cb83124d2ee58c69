"""Spectra and rounding errors of the planned layers, by the settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from hisvd_cli.allocation.anatomy import Anatomy
from hisvd_cli.allocation.byte_budget import BITS, FULL_BITS
from hisvd_cli.allocation.methods import ALLOCATORS, WEIGHT_SPECTRA
from hisvd_cli.allocation.rounding_noise import Rounding
from hisvd_cli.allocation.spectra_cache import SpectraSource, Wanted, load_roundings, load_spectra
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.calibration.store import Calibration
from hisvd_cli.compression.rounding import round_nearest
from hisvd_cli.linalg.moments import exact_device
from hisvd_cli.modeling.layers.shapes import is_stack
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.structure.sublayers import select
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.utils.device import pick_device
from hisvd_cli.utils.progress import Reporter


def find_spectra(
    resolved: Resolved,
    source: Source,
    anatomy: Anatomy,
    calibration: Calibration | None,
    reporter: Reporter,
) -> list[Spectrum]:
    """Return the spectra of the planned sublayers, in the metric of the settings.

    Raises:
        SourceError: the metric needs statistics that were not collected.
    """
    of, wanted = _wanted(resolved, source, anatomy, calibration)
    return load_spectra(of, wanted, reporter)


def find_roundings(
    resolved: Resolved,
    source: Source,
    anatomy: Anatomy,
    calibration: Calibration | None,
    reporter: Reporter,
) -> dict[str, dict[int, Rounding]]:
    """Return sublayer → bits → rounding error in that metric, by the method of the settings. Stacks
    of experts, which are not rounded, have none.

    Raises:
        SourceError: see :func:`find_spectra`.
    """
    of, wanted = _wanted(resolved, source, anatomy, calibration)
    of = replace(of, sublayers=[s for s in of.sublayers if not is_stack(s.shape)])
    group = resolved.settings.quantize.group_size
    methods = {bits: partial(_rounded, bits, group) for bits in BITS if bits < FULL_BITS}
    known = load_roundings(of, wanted, methods, f"nearest {group}", reporter)
    if resolved.settings.quantize.method == "nearest":
        return known
    return {
        name: {bits: each.compensated(bits) for bits, each in own.items()}
        for name, own in known.items()
    }


def _rounded(bits: int, group: int, weight: Tensor) -> Tensor:
    return round_nearest(weight, bits, group).matrix()


def _wanted(
    resolved: Resolved, source: Source, anatomy: Anatomy, calibration: Calibration | None
) -> tuple[SpectraSource, Wanted]:
    knobs = resolved.settings.plan
    device = exact_device(pick_device(resolved.settings.model.device))
    chosen = select(anatomy.sublayers, knobs.include, knobs.exclude)
    values = knobs.model_dump()
    needs = {need for name in knobs.allocator for need in ALLOCATORS.needs(name, values)}
    wanted = Wanted(
        knobs.metric,
        weights=knobs.bytes_ratio is not None or WEIGHT_SPECTRA in needs,
        changes="weight-gradients" in needs,
        input_shrinkage=knobs.input_shrinkage,
        output_shrinkage=knobs.output_shrinkage,
    )
    return SpectraSource(source, chosen, anatomy.names, calibration, device), wanted
