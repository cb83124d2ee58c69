"""A disk that is full ends a run with an error, not with a signal (issue 16, 4)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hisvd_cli.modeling.hidden_states import reserve
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.tensorfile import serializing
from tests.cli_helpers import QUICK, SCRIPT, environment, succeed, two_lines


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "low"
    succeed("compress", *QUICK, "--ratio", 0.6, "--no-evaluate", "--output", folder)
    return folder


def on_a_small_disk(
    folder: Path, size: str, words: Sequence[object]
) -> subprocess.CompletedProcess[str]:
    """Run the command line where ``folder`` is a disk of its own; skip where none can be made."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}'"
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], check=False).returncode:
        pytest.skip("no disk can be made here")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", SCRIPT, *map(str, words)],
        cwd=folder.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_recovery_reserves_the_space_of_hidden_states(checkpoint: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    words = ["compress", "--from", checkpoint, "--recover", "distill", "--recover-seqlen", 64]
    words += ["--recover-tokens", 20_000, "--output", disk / "out"]
    done = on_a_small_disk(disk, "40M", words)
    assert done.returncode == 1, done
    message, hint = two_lines(done.stderr)
    assert message.startswith("Cannot store 0.16 GB of hidden states of the dense model in ")
    assert message.endswith("No space left on device.")
    assert "--recover-samples" in hint


def test_a_single_file_that_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    words = ["convert", checkpoint, "--to", "pt", "--output", disk / "x.pt"]
    done = on_a_small_disk(disk, "1M", words)
    assert done.returncode == 1, done
    message, _ = two_lines(done.stderr)
    assert message == f"Cannot write {disk / 'x.pt'}: No space left on device."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="asks Linux")
def test_an_archive_of_torch_that_does_not_fit() -> None:
    full = Path("/dev/full")
    with pytest.raises(OutputError, match="Cannot write /dev/full"), serializing(full):
        torch.save({"x": torch.zeros(10_000)}, full)


def test_other_errors_of_torch_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inplace"), serializing(tmp_path):
        raise RuntimeError("a leaf is used inplace")


@pytest.mark.parametrize("system", ["allocates", "writes"])
def test_space_is_taken_at_once(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "writes":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path = tmp_path / "x"
    path.write_bytes(b"kept")
    with path.open("ab") as file:
        reserve(file.fileno(), 3_000_000)
        reserve(file.fileno(), 3_000_000)
    assert path.stat().st_size == 3_000_000
    assert path.stat().st_blocks * 512 >= 3_000_000
    assert path.read_bytes()[:5] == b"kept\0"
