"""Spectra of the layers that match a pattern."""

from __future__ import annotations

from collections.abc import Sequence

from hisvd_cli.allocation.anatomy import Anatomy, dissect
from hisvd_cli.allocation.spectrum import Spectrum
from hisvd_cli.modeling.structure.sublayers import select
from hisvd_cli.pipelines.calibration_search import find_calibration
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.planning.spectra import find_spectra
from hisvd_cli.utils.progress import Reporter


def sublayer_spectra(
    resolved: Resolved, patterns: Sequence[str], reporter: Reporter
) -> list[Spectrum]:
    """Return the spectra that a plan is based on, of the layers that match a pattern.

    Raises:
        UsageError: a pattern matches nothing.
    """
    source = named_source(resolved)
    anatomy = dissect(source)
    names = _chosen(resolved, anatomy, patterns)
    calibration = find_calibration(resolved, source, reporter)
    spectra = find_spectra(resolved, source, anatomy, calibration, reporter)
    return [s for s in spectra if s.name in names]


def check_sublayers(resolved: Resolved, patterns: Sequence[str]) -> None:
    """Check before any work that patterns match planned layers. Raises UsageError."""
    _chosen(resolved, dissect(named_source(resolved)), patterns)


def _chosen(resolved: Resolved, anatomy: Anatomy, patterns: Sequence[str]) -> set[str]:
    knobs = resolved.settings.plan
    planned = select(anatomy.sublayers, knobs.include, knobs.exclude)
    return {s.name for s in select(planned, patterns, [])}
