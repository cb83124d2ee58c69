"""Settings ─► the tokens that a calibration is taken from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hisvd_cli.calibration import FORMAT_VERSION, Calibration, Sample
from hisvd_cli.data import (
    check_seqlen,
    load_text,
    model_positions,
    sample_windows,
    tokenize,
    without,
)
from hisvd_cli.device import pick_device, pick_dtype
from hisvd_cli.errors import StaleArtifactError, UsageError
from hisvd_cli.paths import digest, expanded, file_digest
from hisvd_cli.profile import Resolved
from hisvd_cli.reporter import Reporter
from hisvd_cli.selftext import sample_self
from hisvd_cli.source import DEMO, Source

DEFAULT_SEQLEN = 2048
SELF = "self"
"""The dataset that is sampled from the model itself."""


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
    drop: str
    samples: int
    seqlen: int
    seed: int
    device: str
    dtype: str
    key: str


def request_calibration(resolved: Resolved, source: Source) -> CalibrationRequest:
    """Work out what the settings ask for.

    Raises:
        DataError: a window that is too long.
        UsageError: something is to be left out of text that the model writes.
    """
    wanted = resolved.settings.calibration
    model = resolved.settings.model
    dataset = default_dataset(source) if wanted.dataset == "auto" else wanted.dataset
    if wanted.drop and dataset == SELF:
        raise UsageError(
            f"--drop {wanted.drop!r} leaves a word out of a text that is read, but with --dataset "
            f"{SELF} the model writes it.",
            "Leave one of them out.",
        )
    seqlen = window_length(wanted.seqlen, source)
    device = pick_device(model.device)
    dtype = str(pick_dtype(model.dtype, stored_dtype(source), device)).removeprefix("torch.")
    path = expanded(dataset)
    content = file_digest(path) if path.is_file() else dataset
    key = digest(
        str(FORMAT_VERSION),
        source.fingerprint,
        tokenizer_digest(source),
        content,
        f"{wanted.samples} {seqlen} {wanted.seed} {dtype}",
        *([wanted.drop] if wanted.drop else []),
    )
    return CalibrationRequest(
        dataset,
        wanted.drop,
        wanted.samples,
        seqlen,
        wanted.seed,
        str(device),
        dtype,
        key,
    )


def stored_dtype(source: Source) -> str:
    """Return the dtype that most of the weights have on disk."""
    return source.weights.dtype


def tokenizer_digest(source: Source) -> str:
    """Return a hash of a model's tokenizer, the same for models that share it."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    files = [source.folder / name for name in names]
    return digest(*(file_digest(path) for path in files if path.is_file()))


def draw_sample(request: CalibrationRequest, source: Source, reporter: Reporter) -> Sample:
    """Load, tokenize and sample the calibration text. Raises DataError."""
    if request.dataset == SELF:
        return _self_sample(request, source, reporter)
    text = load_text(request.dataset, "calibration")
    windows = sample_windows(
        tokenize(without(text, request.drop), source),
        request.samples,
        request.seqlen,
        request.seed,
        text.name,
    )
    if len(windows) < request.samples:
        reporter.warn(
            f"'{text.name}' holds {len(windows)} windows of {request.seqlen} tokens; using all of "
            f"them instead of {request.samples}."
        )
    return Sample(windows, text.name, text.split, text.digest, request.seed, request.drop)


def _self_sample(request: CalibrationRequest, source: Source, reporter: Reporter) -> Sample:
    """Sample the text from the model itself."""
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
    """Draw again the tokens that a calibration was made from.

    Raises:
        StaleArtifactError: its text reads otherwise now.
        DataError: its text cannot be read.
    """
    data, made = found.manifest["data"], found.manifest["settings"].get("calibration", {})
    request = CalibrationRequest(
        dataset=data["dataset"],
        drop=data.get("drop", ""),
        samples=made.get("samples", data["samples"]),
        seqlen=data["seqlen"],
        seed=data["seed"],
        device=str(pick_device(resolved.settings.model.device)),
        dtype=found.manifest["dtype"],
        key=found.key,
    )
    sample = draw_sample(request, source, reporter)
    if sample.key != data["tokens_sha256"]:
        raise StaleArtifactError(
            f"The text '{data['dataset']}' is not what {found.folder} was calibrated on.",
            "Bring the text back, or calibrate anew into another folder.",
        )
    return sample
