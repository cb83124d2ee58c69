"""Settings ─► what a plan looks at of every sublayer: its spectra, and what rounding it does."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hisvd_cli.allocate import ALLOCATORS
from hisvd_cli.build.anatomy import Anatomy
from hisvd_cli.byte_budget import BITS, FULL_BITS
from hisvd_cli.calibration import Calibration
from hisvd_cli.device import pick_device
from hisvd_cli.moments import exact_device
from hisvd_cli.profile import Resolved
from hisvd_cli.reporter import Reporter
from hisvd_cli.rounding import round_nearest
from hisvd_cli.rounding_noise import Rounding
from hisvd_cli.source import Source
from hisvd_cli.spectra_cache import SpectraSource, Wanted, load_roundings, load_spectra
from hisvd_cli.spectrum import Spectrum
from hisvd_cli.sublayers import select


def find_spectra(
    resolved: Resolved,
    source: Source,
    anatomy: Anatomy,
    calibration: Calibration | None,
    reporter: Reporter,
) -> list[Spectrum]:
    """Return the spectra of the planned sublayers, in the metric of the settings.

    Raises:
        SourceError: the metric needs statistics that were not taken.
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
    """Return sublayer → bits → what rounding does in that metric, by the method of the settings.

    Raises:
        SourceError: see :func:`find_spectra`.
    """
    of, wanted = _wanted(resolved, source, anatomy, calibration)
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
    wanted = Wanted(
        knobs.metric,
        weights=knobs.bytes_ratio is not None
        or ("hisvd" in knobs.allocator and knobs.spectrum == "weight"),
        changes=any("weight-gradients" in ALLOCATORS.needs(name) for name in knobs.allocator),
        input_shrinkage=knobs.input_shrinkage,
        output_shrinkage=knobs.output_shrinkage,
    )
    return SpectraSource(source, chosen, anatomy.names, calibration, device), wanted
