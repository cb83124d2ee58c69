"""SIGKILL in the middle: the rerun goes on after the last finished block, to the same bytes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli_helpers import digests, running, script, stop_at

# Enough text that a block of the demo model takes a noticeable time.
CALIBRATION = ("--model", "demo", "--samples", 40, "--seqlen", 256, "--calibration", "calibration")
COMPRESSION = ("compress", *CALIBRATION, "--ratio", 0.6, "--no-evaluate", "--max-shard-size", 0.001)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the calibration and the checkpoint of runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    cache = {"HISVD_CACHE": str(folder / "cache")}
    done = script(*COMPRESSION, cwd=folder, env=cache)
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_runs_end_as_if_nothing_had_stopped_them(
    uninterrupted: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".calibration.partial"
    with running("calibrate", *CALIBRATION, cwd=tmp_path) as process:
        stop_at(process, "block-*.safetensors", partial, 3, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "calibration").exists()
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("block-*.safetensors")}
    assert 3 <= len(times) < 6

    making = tmp_path / ".demo-0.6.partial"
    with running(*COMPRESSION, cwd=tmp_path) as process:  # ends the calibration first
        stop_at(process, "*.part", making, 20, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "demo-0.6").exists()
    for name, time in times.items():
        assert (tmp_path / "calibration" / name).stat().st_mtime_ns == time, "measured again"
    calibration = digests(tmp_path / "calibration")
    assert calibration == digests(uninterrupted / "calibration")
    parts = {path.name: path.stat().st_ino for path in making.glob("*.part")}
    assert 20 <= len(parts) < 49  # of six blocks of seven sublayers and what stays, and one more

    done = script(*COMPRESSION, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seconds"]["calibrate"] < 1
    made = digests(tmp_path / "demo-0.6")
    assert len([name for name in made if name.endswith(".safetensors")]) > 2
    assert made == digests(uninterrupted / "demo-0.6")
    assert digests(tmp_path / "calibration") == calibration
    left = {path.name for path in tmp_path.iterdir()} - {"hisvd-cache"}
    assert left == {"calibration", "demo-0.6"}
