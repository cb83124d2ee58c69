"""Selects the text and tokens of a calibration by the settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hisvd_cli.calibration.store import FORMAT_VERSION, Calibration, Sample
from hisvd_cli.calibration.text.datasets import FILE, Text, load_text, without
from hisvd_cli.calibration.text.self_text import sample_self
from hisvd_cli.calibration.text.tokens import (
    check_seqlen,
    model_positions,
    sample_windows,
    tokenize,
)
from hisvd_cli.modeling.sources.source import DEMO, Source
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.errors import OutputError, StaleArtifactError, UsageError
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.fingerprints import cache_root, digest, expanded, file_digest
from hisvd_cli.utils.files.safetensors_header import dtype_name
from hisvd_cli.utils.progress import Reporter
from hisvd_cli.utils.quantities import counted

DEFAULT_SEQLEN = 2048
DEFAULT_SAMPLES = 256
DEMO_SAMPLES = 64
"""A quarter of the demo text, so that the demo runs in seconds: more windows change little
(perplexity 29.59 instead of 29.62 at ratio 0.6)."""
SELF = "self"
"""The name of the dataset that the model generates itself."""


def default_dataset(source: Source) -> str:
    """Return the default text; the demo model has its own."""
    return DEMO if source.name == DEMO else "wikitext2"


def default_samples(dataset: str) -> int:
    """Return the default number of windows."""
    return DEMO_SAMPLES if dataset == DEMO else DEFAULT_SAMPLES


def window_length(given: int | None, source: Source, setting: str = "calibration.seqlen") -> int:
    """Return the tokens per window: the given number, or else 2048, or the number of positions of
    the model if that is lower.

    Args:
        given: the number in the settings.
        source: the model.
        setting: key of that setting, for the error.

    Raises:
        DataError: the given number exceeds the positions of the model.
    """
    if given is not None:
        check_seqlen(given, source, f"`{setting}`")
        return given
    return min(DEFAULT_SEQLEN, model_positions(source) or DEFAULT_SEQLEN)


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""The files that decide how texts and conversations are tokenized."""


@dataclass(frozen=True)
class CalibrationRequest:
    """The requested calibration; its key does not depend on reading named datasets."""

    dataset: str
    drop: str
    samples: int
    seqlen: int
    seed: int
    device: str
    dtype: str
    key: str


def request_calibration(resolved: Resolved, source: Source) -> CalibrationRequest:
    """Return the calibration that the settings request.

    Raises:
        DataError: the windows are too long.
        UsageError: a string is to be removed from text that the model generates.
    """
    wanted = resolved.settings.calibration
    model = resolved.settings.model
    dataset = default_dataset(source) if wanted.dataset == "auto" else wanted.dataset
    if wanted.drop and dataset == SELF:
        raise UsageError(
            f"`calibration.drop` {wanted.drop!r} removes a string from a text that is read, but "
            f"with `calibration.dataset={SELF}` the model generates the text.",
            "Leave out one of them.",
        )
    samples = wanted.samples or default_samples(dataset)
    seqlen = window_length(wanted.seqlen, source)
    device = pick_device(model.device)
    dtype = dtype_name(pick_dtype(model.dtype, stored_dtype(source), device))
    path = expanded(dataset)
    content = file_digest(path) if path.is_file() else dataset
    key = digest(
        str(FORMAT_VERSION),
        source.fingerprint,
        tokenizer_digest(source),
        content,
        f"{samples} {seqlen} {wanted.seed} {dtype}",
        *([wanted.drop] if wanted.drop else []),
    )
    return CalibrationRequest(
        dataset,
        wanted.drop,
        samples,
        seqlen,
        wanted.seed,
        str(device),
        dtype,
        key,
    )


def stored_dtype(source: Source) -> str:
    """Return the dtype of most weights on disk."""
    return source.weights.dtype


def calibrated_dtype(resolved: Resolved, found: Calibration) -> torch.dtype:
    """Return the dtype of further forward passes with a calibration: its own dtype if the settings
    name it or the device is fast in it, else float32."""
    made, named = found.manifest["dtype"], resolved.settings.model.dtype
    device = pick_device(resolved.settings.model.device)
    return pick_dtype(made if named == made else "auto", made, device)


def tokenizer_digest(source: Source) -> str:
    """Return a hash of a model's tokenizer files."""
    files = [source.folder / name for name in TOKENIZER_FILES]
    return digest(*(f"{path.name} {file_digest(path)}" for path in files if path.is_file()))


def draw_sample(request: CalibrationRequest, source: Source, reporter: Reporter) -> Sample:
    """Load, tokenize and sample the calibration text. Raises DataError."""
    if request.dataset == SELF:
        return _self_sample(request, source, reporter)
    text = load_text(request.dataset, "calibration")
    if text.split == FILE:
        _remember(text, Path(request.dataset))
    windows = sample_windows(
        tokenize(without(text, request.drop), source),
        request.samples,
        request.seqlen,
        request.seed,
        text.name,
    )
    if len(windows) < request.samples:
        reporter.warn(
            f"'{text.name}' holds {counted(len(windows), 'window')} of {request.seqlen} tokens; "
            f"using all of them instead of {request.samples}."
        )
    return Sample(windows, text.name, text.split, text.digest, request.seed, request.drop)


def _self_sample(request: CalibrationRequest, source: Source, reporter: Reporter) -> Sample:
    """Sample tokens from the model itself."""
    tokens = sample_self(
        source,
        request.samples,
        request.seqlen,
        request.seed,
        device=torch.device(request.device),
        dtype=getattr(torch, request.dtype),
        reporter=reporter,
    )
    return Sample(tokens, SELF, "sampled", digest(tokens.numpy().tobytes()), request.seed)


def calibration_sample(
    resolved: Resolved, source: Source, found: Calibration, reporter: Reporter
) -> Sample:
    """Draw the tokens of a calibration again.

    Raises:
        StaleArtifactError: its text has changed.
        DataError: its text cannot be read.
    """
    data = found.manifest["data"]
    sample = _drawn_again(request_of(resolved, found), data, source, reporter)
    if sample.key != data["tokens_sha256"]:
        raise StaleArtifactError(
            f"The text '{data['dataset']}' differs from the one that {found.folder} was calibrated "
            "on.",
            "Restore the text, or calibrate again into another folder.",
        )
    return sample


def request_of(resolved: Resolved, found: Calibration) -> CalibrationRequest:
    """Return the request that a calibration was made by."""
    data, made = found.manifest["data"], found.manifest["settings"].get("calibration", {})
    return CalibrationRequest(
        dataset=data["dataset"],
        drop=data.get("drop", ""),
        samples=made.get("samples", data["samples"]) or default_samples(data["dataset"]),
        seqlen=data["seqlen"],
        seed=data["seed"],
        device=str(pick_device(resolved.settings.model.device)),
        dtype=found.manifest["dtype"],
        key=found.key,
    )


def other_sample(
    resolved: Resolved, source: Source, found: Calibration, reporter: Reporter
) -> Sample:
    """Draw tokens by the settings; settings that are not given are those of a calibration.

    Raises:
        DataError: the text cannot be read, or the windows are too long.
    """
    keys = resolved.asked("calibration")
    if "dataset" in keys:
        return draw_sample(request_calibration(resolved, source), source, reporter)
    given: dict[str, Any] = {key: resolved.value("calibration", key) for key in keys}
    if "seqlen" in given:
        check_seqlen(given["seqlen"], source, "`calibration.seqlen`")
    request = replace(request_of(resolved, found), **given)
    return _drawn_again(request, found.manifest["data"], source, reporter)


def _drawn_again(
    request: CalibrationRequest, data: Mapping[str, Any], source: Source, reporter: Reporter
) -> Sample:
    """Draw a sample of the text of a manifest, under its recorded name."""
    named = replace(request, dataset=located(data) or request.dataset)
    return replace(draw_sample(named, source, reporter), dataset=request.dataset)


def located(data: Mapping[str, Any]) -> str | None:
    """Return the name under which the text of a calibration's manifest is found, None if it is not
    found.

    A file that was named relative to another folder is found through the cache, by its content. The
    manifest does not record absolute paths, since it is published with a checkpoint.
    """
    name, wanted = str(data["dataset"]), str(data.get("text_sha256"))
    if data.get("split") != FILE or "text_sha256" not in data or _holds(expanded(name), wanted):
        return name
    try:
        known = _place_of(wanted).read_text(encoding="utf-8")
    except OSError:
        return None
    return known if _holds(Path(known), wanted) else None


def is_text_of(name: str, data: Mapping[str, Any]) -> bool:
    """Return whether a name means the text of a calibration's manifest. Existing files are compared
    by content.

    Raises:
        DataError: the file cannot be read.
    """
    path = expanded(name)
    if path.is_file() and "text_sha256" in data:
        return _holds(path, str(data["text_sha256"]))
    return path.name == Path(str(data["dataset"])).name


def _holds(path: Path, wanted: str) -> bool:
    return path.is_file() and load_text(str(path), "calibration").digest == wanted


def _place_of(text: str) -> Path:
    return cache_root() / "texts" / text


def _remember(text: Text, path: Path) -> None:
    """Record the path of a text in the cache, for later runs in other folders."""
    with suppress(OutputError):  # an unwritable cache is no failure
        write_text(_place_of(text.digest), str(path.expanduser().resolve()))
