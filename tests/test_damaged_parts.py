"""A run is killed, and what it left loses a bit: the rerun makes it again, to the same bytes."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hisvd_cli.evaluation.perplexity import Sums
from hisvd_cli.evaluation.store import Store
from hisvd_cli.utils.files.checksums import BLANK, KEY, PLACE, intact, seal, sealed
from hisvd_cli.utils.files.tensorfile import join_files, write_parts, write_tensors
from tests.cli_helpers import digests, environment, succeed, text_file
from tests.conftest import MakeModel
from tests.processes import Command

KILLED = """
import os, signal, sys
from hisvd_cli.calibration import calibrate
from hisvd_cli.calibration import gradients
from hisvd_cli.utils.files import tensorfile
from hisvd_cli.cli.app import main

pattern, left = sys.argv[1], int(sys.argv[2])
remember = tensorfile.remember


def count(path):
    global left
    remember(path)
    left -= path.match(pattern)
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


tensorfile.remember = count
for function in (calibrate.calibrate, gradients.measure_gradients):
    function.__kwdefaults__["state_seconds"] = 0.0
sys.argv = ["hisvd", *sys.argv[3:]]
main()
"""
"""Kills itself as soon as so many tensor files of a name are complete; keeps states at once."""
Words = tuple[object, ...]


def flip(path: Path, place: int = -3) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def killed(words: Words, pattern: str, count: int, folder: Path) -> None:
    done = Command((pattern, count, *words), folder, environment(), KILLED)
    _, stderr = done.communicate()
    assert done.returncode == -signal.SIGKILL, stderr


@pytest.fixture
def text(tmp_path: Path) -> Words:
    return ("--dataset", text_file(tmp_path), "--samples", 6, "--seqlen", 32)


COMPRESS = ("compress", "--ratio", 0.5, "--output", "made", "--max-shard-size", 0.00002)
STAGES = (*COMPRESS, "--stages", 2, "--correction")
DISTILL = (*COMPRESS, "--recover", "distill", "--recover-tokens", 600, "--recover-seqlen", 16)
GRADIENTS = ("calibrate", "--calibration", "made", "--weight-gradients")
STAGE = ".made.hisvd.work/.stages.partial/stage-1"
CASES: dict[str, tuple[Words, str, int, str]] = {
    "factors": (COMPRESS, "*.part", 9, ".made.partial/*.part"),
    "shards": (COMPRESS, "model-*", 2, ".made.partial/model-*"),
    "parts beside shards": (COMPRESS, "model-*", 2, ".made.partial/*.part"),
    "updates": ((*COMPRESS, "--update", "propagated"), "*.part", 9, ".made.partial/*.part"),
    "calibration": (("calibrate", "--calibration", "made"), "block-*", 2, ".made.partial/block-*"),
    "hidden states": (
        ("calibrate", "--calibration", "made"),
        "hidden-00002*",
        1,
        ".made.partial/hidden-*",
    ),
    "inputs": (GRADIENTS, "gradient-*", 1, "made/inputs/*"),
    "gradients": (GRADIENTS, "gradient-00000*", 1, "made/.gradients.partial/block-00002*"),
    "carried gradient": (GRADIENTS, "gradient-00000*", 1, "made/.gradients.partial/gradient-*"),
    "blended": (
        (*STAGES, "alpha-blend"),
        ".corrected.partial/*",
        2,
        f"{STAGE}/.corrected.partial/*",
    ),
    "stages": (
        (*STAGES, "pull-subspace"),
        ".corrected.partial/block-*",
        2,
        f"{STAGE}/.corrected.partial/block-*",
    ),
    "checkpoint of a stage": (
        (*STAGES, "alpha-blend"),
        ".corrected.partial/*",
        1,
        f"{STAGE}/checkpoint/model-*",
    ),
    "plan of a stage": (
        (*STAGES, "alpha-blend"),
        "stage-2/.calibration.partial/*",
        1,
        f"{STAGE}/plan.json",
    ),
    "weights of a stage": (
        (*STAGES, "alpha-blend"),
        "stage-2/.calibration.partial/*",
        1,
        f"{STAGE}/corrected/*.safetensors",
    ),
    "untrained checkpoint": (DISTILL, "best.safetensors", 1, ".made.hisvd.work/untrained/model-*"),
    "trained factors": (DISTILL, "best.safetensors", 1, ".made.partial/training/best*"),
    "states of the teacher": (DISTILL, "best.safetensors", 1, ".made.partial/training/teacher/s*"),
}


QUICKEST = ("calibration", "factors", "trained factors")


@pytest.mark.parametrize(
    "case", [c if c in QUICKEST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_3_a_bit_flip_in_what_a_killed_run_left_is_made_again(
    case: str,
    text: Words,
    tiny_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, pattern, count, victims = CASES[case]
    words = (*words, "--model", tiny_model("llama"), *text)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    succeed(*words)
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / "cache of two"))
    killed(words, pattern, count, tmp_path / "two")
    damaged = list((tmp_path / "two").glob(victims))
    assert damaged
    for path in damaged:
        flip(path)
    monkeypatch.chdir(tmp_path / "two")
    succeed(*words)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_3_a_bit_flip_in_quantized_parts_is_made_again(
    text: Words, tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("compress", "--model", tiny_model("llama"), *text, "--ratio", 0.5, "--output", "ck")
    form = ("--quantize", "int4", "--quantize-method", "gptq", "--max-shard-size", 0.00001)
    succeed("convert", "ck", *form, "--output", "one/made")
    for pattern in ("*.part", "model-*"):
        killed(("convert", "ck", *form, "--output", "two/made"), pattern, 2, tmp_path)
        for path in (tmp_path / "two/.made.partial").glob(pattern):
            flip(path)
        succeed("convert", "ck", *form, "--output", "two/made")
        assert digests(tmp_path / "two") == digests(tmp_path / "one")
        shutil.rmtree(tmp_path / "two/made")


def test_3_a_bit_flip_in_a_converted_shard_is_made_again(
    text: Words, tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("compress", "--model", tiny_model("llama"), *text, "--ratio", 0.5, "--output", "ck")
    for to in ("dense", "hf"):
        form = ("--to", to, "--max-shard-size", 0.00002, "--overwrite")
        succeed("convert", "ck", *form, "--output", "one/made")
        killed(("convert", "ck", *form, "--output", "two/made"), "model-*", 3, tmp_path)
        shards = sorted((tmp_path / "two/.made.partial").glob("model-*"))
        kept = shards[0].stat().st_ino
        flip(shards[1])
        succeed("convert", "ck", *form, "--output", "two/made")
        assert digests(tmp_path / "two") == digests(tmp_path / "one")
        assert (tmp_path / "two/made" / shards[0].name).stat().st_ino == kept


def written(path: Path) -> None:
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.arange(3).bfloat16()}, {"x": "y"})


def joined(path: Path) -> None:
    written(path.with_name("part"))
    join_files([path.with_name("part")], path, {"format": "pt"})


def in_parts(path: Path) -> None:
    write_parts(path, "a", [torch.ones(2, 3), torch.zeros(1, 3)], {}, lambda: None)


@pytest.mark.parametrize("write", [written, joined, in_parts])
def test_3_every_bit_of_a_tensor_file_counts(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path)
    assert intact(path)
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert not intact(path), place
    for short in (b"", data[:PLACE], data[: PLACE + len(BLANK)], data[:-1], data + b"0"):
        path.write_bytes(short)
        assert not intact(path)
    path.write_bytes(data)
    assert intact(path)
    path.unlink()
    assert not intact(path)
    assert data[8:].startswith(f'{{"__metadata__":{{"{KEY}":"'.encode())


def test_3_a_sealed_folder_holds_what_it_held(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert not sealed(folder)
    for name in ("a", "b"):
        (folder / name).write_text(name)
    seal(folder)
    (folder / "later").write_text("c")
    assert sealed(folder)
    flip(folder / "b", 0)
    assert not sealed(folder)
    seal(folder)
    (folder / "a").unlink()
    assert not sealed(folder)
    (folder / ".seal").write_text("[]")
    assert not sealed(folder)


def test_3_a_bit_flip_in_a_kept_measurement_is_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("key", {"model": "m"}, Sums(torch.tensor([[1.5, 2.5]])))
    assert store.load("key") is not None
    path = store.path("key")
    path.write_text(path.read_text().replace("1.5", "1.4"))
    assert store.load("key") is None
