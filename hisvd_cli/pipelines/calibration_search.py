"""Finds an existing calibration that matches the settings."""

from __future__ import annotations

from pathlib import Path

from hisvd_cli.calibration.store import MANIFEST, Calibration, open_calibration
from hisvd_cli.linalg.statistics import Need
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.output_names import output_name
from hisvd_cli.pipelines.samples import is_text_of, request_calibration
from hisvd_cli.utils.errors import SourceError, StaleArtifactError
from hisvd_cli.utils.files.fingerprints import cache_root, slug
from hisvd_cli.utils.progress import Reporter


def calibration_home(source: Source) -> Path:
    """Return the cache folder that holds all calibrations of a model."""
    return cache_root() / "calibration" / f"{slug(source.name)}-{source.fingerprint[:12]}"


def find_calibration(resolved: Resolved, source: Source, reporter: Reporter) -> Calibration | None:
    """Return a finished calibration that matches the settings, or None.

    The order is: the named folder; the calibration with exactly these settings; and, if no
    calibration setting is given, the newest one of the model.

    Raises:
        StaleArtifactError: the named folder was made from another model, or with other settings
            than those given.
    """
    if named := resolved.settings.calibration.path:
        folder = output_name(Path(named), "calibration.path")
        if not (folder / MANIFEST).is_file():
            return None
        found = open_calibration(folder, source)
        _check_settings(resolved, found)
        return found
    exact = calibration_home(source) / request_calibration(resolved, source).key[:16]
    if (exact / MANIFEST).is_file():
        return open_calibration(exact, source)
    if resolved.asked("calibration"):
        return None
    return _newest(source, reporter)


def _check_settings(resolved: Resolved, found: Calibration) -> None:
    """Raise StaleArtifactError if a named calibration contradicts another calibration setting."""
    data = found.manifest["data"]
    wanted = found.manifest["settings"].get("calibration", {})
    made = {"drop": "", **data}
    made["samples"] = (
        wanted.get("samples") or data["samples"]
    )  # the text may have had fewer windows
    for key in resolved.asked("calibration"):
        given = resolved.value("calibration", key)
        same = str(given) == str(made[key])
        if key == "dataset":  # the same file may have another relative path
            same = is_text_of(given, data)
        if not same:
            setting, place = f"`calibration.{key}`", resolved.place("calibration", key)
            if resolved.is_flag("calibration", key):
                place = setting
            changed = " as it is now" if str(given) == str(made[key]) else ""
            raise StaleArtifactError(
                f"{found.folder} was calibrated with {setting} {made[key]}, not {given}{changed}.",
                f"Leave out {place}, or name another folder with `calibration.path`.",
            )


def _newest(source: Source, reporter: Reporter) -> Calibration | None:
    manifests = calibration_home(source).glob(f"[!.]*/{MANIFEST}")
    made = sorted(manifests, key=lambda path: path.stat().st_mtime)
    if not made:
        return None
    found = open_calibration(made[-1].parent, source)
    data = found.manifest["data"]
    reporter.warn(
        f"No calibration settings given: using the newest calibration of {source.name}, "
        f"{data['samples']} × {data['seqlen']} tokens of {data['dataset']}."
    )
    return found


def wanted_statistics(resolved: Resolved) -> frozenset[Need]:
    """Return which statistics the settings request."""
    calibration = resolved.settings.calibration
    if calibration.weight_gradients:
        return frozenset({"moments", "gradients", "weight-gradients"})
    return frozenset({"moments", "gradients"} if calibration.gradients else {"moments"})


def require_calibration(resolved: Resolved, source: Source, reporter: Reporter) -> Calibration:
    """Return the calibration that the settings name. Raises SourceError if it does not exist."""
    found = find_calibration(resolved, source, reporter)
    if found is None:
        raise SourceError(
            f"There is no calibration at '{resolved.settings.calibration.path}'.",
            "Create it with: hisvd calibrate --calibration PATH",
        )
    return found
