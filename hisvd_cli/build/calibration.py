"""Settings ─► a source and its calibration: found where it was made before, else made now."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hisvd_cli.calibrate import (
    FORMAT_VERSION,
    MANIFEST,
    Calibration,
    Sample,
    calibrate,
    calibration_key,
    open_calibration,
)
from hisvd_cli.data import check_seqlen, load_text, model_positions, sample_windows, tokenize
from hisvd_cli.device import pick_device, pick_dtype
from hisvd_cli.errors import OutputError, SourceError, StaleArtifactError, UsageError
from hisvd_cli.paths import cache_root, digest, file_digest, slug
from hisvd_cli.profile import Resolved
from hisvd_cli.reporter import Reporter
from hisvd_cli.settings import flag_of
from hisvd_cli.source import DEMO, Source, open_source

DEFAULT_SEQLEN = 2048


def named_source(resolved: Resolved) -> Source:
    """Open the model of the settings. Raises UsageError where none is named."""
    model = resolved.settings.model
    if not model.name:
        raise UsageError(
            "No model is named.", "Give --model with a hub id, a folder, a .gguf file, or 'demo'."
        )
    return open_source(model.name, model.revision, model.trust_remote_code)


def default_dataset(source: Source) -> str:
    """Return the text used where none is named: the demo model has its own."""
    return DEMO if source.name == DEMO else "wikitext2"


def window_length(asked: int | None, source: Source) -> int:
    """Return tokens per window: as asked, else 2048 or the model's positions if fewer.

    Raises:
        DataError: longer than the model's positions.
    """
    if asked is not None:
        check_seqlen(asked, source)
        return asked
    return min(DEFAULT_SEQLEN, model_positions(source) or DEFAULT_SEQLEN)


@dataclass(frozen=True)
class CalibrationRequest:
    """Which calibration is asked for; its key is known without reading the text."""

    dataset: str
    samples: int
    seqlen: int
    seed: int
    device: str
    dtype: str
    key: str


def request_calibration(resolved: Resolved, source: Source) -> CalibrationRequest:
    """Work out what the settings ask for. Raises DataError for a window that is too long."""
    wanted = resolved.settings.calibration
    model = resolved.settings.model
    dataset = default_dataset(source) if wanted.dataset == "auto" else wanted.dataset
    seqlen = window_length(wanted.seqlen, source)
    device = pick_device(model.device)
    dtype = str(pick_dtype(model.dtype, stored_dtype(source), device)).removeprefix("torch.")
    path = Path(dataset).expanduser()
    content = file_digest(path) if path.is_file() else dataset
    key = digest(
        str(FORMAT_VERSION),
        source.fingerprint,
        _tokenizer_digest(source),
        content,
        f"{wanted.samples} {seqlen} {wanted.seed} {dtype}",
    )
    return CalibrationRequest(dataset, wanted.samples, seqlen, wanted.seed, str(device), dtype, key)


def stored_dtype(source: Source) -> str:
    """Return the dtype that most of the weights have on disk."""
    sizes: dict[str, int] = {}
    for info in source.weights.infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _tokenizer_digest(source: Source) -> str:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    files = [source.folder / name for name in names]
    return digest(*(file_digest(path) for path in files if path.is_file()))


def calibration_home(source: Source) -> Path:
    """Return the cache folder that holds all calibrations of a model."""
    return cache_root() / "calibration" / f"{slug(source.name)}-{source.fingerprint[:12]}"


def find_calibration(resolved: Resolved, source: Source, reporter: Reporter) -> Calibration | None:
    """Return a finished calibration that fits the settings, or None.

    The folder named by ``--calibration`` wins; then the one with exactly these settings; then,
    where the settings ask for nothing in particular, the model's newest.

    Raises:
        StaleArtifactError: the folder named was made for another model, or of another text than
            the settings name.
    """
    if named := resolved.settings.calibration.path:
        folder = Path(named).expanduser()
        if not (folder / MANIFEST).is_file():
            return None
        found = open_calibration(folder, source)
        _check_asked(resolved, found)
        return found
    exact = calibration_home(source) / request_calibration(resolved, source).key[:16]
    if (exact / MANIFEST).is_file():
        return open_calibration(exact, source)
    if any(section == "calibration" for section, _ in resolved.origins):
        return None
    return _newest(source, reporter)


def _check_asked(resolved: Resolved, found: Calibration) -> None:
    """Refuse a calibration that differs from what was asked for beside its folder."""
    data = found.manifest["data"]
    wanted = found.manifest["settings"].get("calibration", {})
    made = {**data, "samples": wanted.get("samples", data["samples"])}  # a text may hold fewer
    for key in ("dataset", "samples", "seqlen", "seed"):
        asked = resolved.value("calibration", key)
        if resolved.is_flag("calibration", key) and _bare(asked) != _bare(made[key]):
            flag = flag_of("calibration", key)
            raise StaleArtifactError(
                f"{found.folder} was calibrated with {flag} {made[key]}, not {asked}.",
                f"Leave out {flag}, or name another folder with --calibration.",
            )


def _bare(value: str | int) -> str | int:
    """A file may be named from another folder than it was at first."""
    return Path(value).name if isinstance(value, str) else value


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


def draw_sample(request: CalibrationRequest, source: Source, reporter: Reporter) -> Sample:
    """Load, tokenize and sample the calibration text. Raises DataError."""
    text = load_text(request.dataset, "calibration")
    windows = sample_windows(
        tokenize(text, source), request.samples, request.seqlen, request.seed, text.name
    )
    if len(windows) < request.samples:
        reporter.warn(
            f"'{text.name}' holds {len(windows)} windows of {request.seqlen} tokens; using all of "
            f"them instead of {request.samples}."
        )
    return Sample(windows, text.name, text.split, text.digest, request.seed)


def ensure_calibration(
    resolved: Resolved, source: Source, reporter: Reporter, reuse_any: bool = True
) -> tuple[Calibration, float]:
    """Return a calibration, made now where there is none, and the seconds that it took.

    Args:
        resolved: the settings.
        source: the model.
        reporter: told of progress.
        reuse_any: False only takes a calibration with exactly these settings.

    Raises:
        StaleArtifactError: the folder named holds a calibration of another model, or (without
            ``reuse_any``) of other settings.
        OutputError: the folder named holds something else.
    """
    started = time.monotonic()
    if reuse_any and (found := find_calibration(resolved, source, reporter)):
        return found, time.monotonic() - started
    made = _calibrate(resolved, source, reporter)
    return made, time.monotonic() - started


def _calibrate(resolved: Resolved, source: Source, reporter: Reporter) -> Calibration:
    request = request_calibration(resolved, source)
    named = resolved.settings.calibration.path
    folder = Path(named).expanduser() if named else calibration_home(source) / request.key[:16]
    if not named and (folder / MANIFEST).is_file():
        return open_calibration(folder, source)
    present = _present(folder, source)
    sample = draw_sample(request, source, reporter)
    dtype: torch.dtype = getattr(torch, request.dtype)
    if present is not None:
        if present.key != calibration_key(source, sample, dtype):
            raise StaleArtifactError(
                f"{folder} holds a calibration of other data or settings.",
                "Name another folder with --calibration, or remove that one.",
            )
        return present
    return calibrate(
        source,
        sample,
        folder,
        device=torch.device(request.device),
        dtype=dtype,
        batch=resolved.settings.calibration.batch,
        settings=resolved.recorded("model", "calibration"),
        reporter=reporter,
    )


def _present(folder: Path, source: Source) -> Calibration | None:
    """Return the calibration that stands in a folder; refuse anything else there."""
    if (folder / MANIFEST).is_file():
        return open_calibration(folder, source)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(
            f"{folder} holds something that is no calibration.",
            "Name another folder with --calibration.",
        )
    return None


def require_calibration(resolved: Resolved, source: Source, reporter: Reporter) -> Calibration:
    """Return the calibration named by the settings. Raises SourceError where it does not exist."""
    found = find_calibration(resolved, source, reporter)
    if found is None:
        raise SourceError(
            f"There is no calibration at '{resolved.settings.calibration.path}'.",
            "Run: hisvd calibrate --calibration with that folder.",
        )
    return found
