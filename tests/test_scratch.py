"""Temporary files: where they are, whose they are, and that the next command removes what nobody
owns (issue 16, 4)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.cache import cache_root
from hisvd_cli.utils.files.owners import WEEK_SECONDS, is_abandoned, own_tag
from hisvd_cli.utils.files.scratch import clear_beside, scratch_folder, sweep
from tests.cli_helpers import QUICK, fail, running, script, succeed

STATES = "evaluations/states"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scratch") / "low.pt"
    succeed("compress", *QUICK, "--ratio", 0.6, "--no-evaluate", "--output", path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ended() -> str:
    """Return the tag of a process that has ended."""
    code = "from hisvd_cli.utils.files.owners import own_tag; print(own_tag())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def age(path: Path) -> None:
    """Have nobody touched a file for more than a week."""
    then = time.time() - WEEK_SECONDS - 60
    os.utime(path, (then, then))


def test_a_temporary_folder_is_in_the_cache_and_goes(cache: Path) -> None:
    with scratch_folder(None) as folder:
        assert folder.parent == cache / "scratch"
        (folder / "x").write_text("x")
        sweep(None)
        assert (folder / "x").is_file(), "its owner runs"
    assert not list((cache / "scratch").iterdir())


def test_a_temporary_folder_goes_where_the_settings_say(cache: Path, tmp_path: Path) -> None:
    with scratch_folder(str(tmp_path / "large")) as folder:
        assert folder.parent == tmp_path / "large"
    assert not cache.exists()


def test_only_what_has_no_owner_is_removed(cache: Path) -> None:
    root = cache / "scratch"
    dead, mine = f"hisvd-{ended()}-abc", f"hisvd-{own_tag()}-abc"
    _, process, started = own_tag().split("-")
    reused = f"hisvd-{own_tag().rpartition('-')[0]}-{int(started, 16) ^ 1:04x}-abc"
    host = f"{int(own_tag().split('-')[0], 16) ^ 1:04x}"
    elsewhere, old = (f"hisvd-{host}-{process}-{started}-{name}" for name in ("new", "old"))
    names = (dead, mine, reused, elsewhere, old, "hisvd-notes", "other")
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("x")
    age(root / old)
    sweep(None)
    assert {path.name for path in root.iterdir()} == {mine, elsewhere, "hisvd-notes", "other"}


def test_a_tag_of_something_else_is_nobodys(tmp_path: Path) -> None:
    assert not is_abandoned("4711", tmp_path)


def test_the_next_write_removes_what_a_killed_process_had_begun(tmp_path: Path) -> None:
    left = tmp_path / f".x.json.{ended()}.tmp"
    others = [tmp_path / f".x.json.{own_tag()}.tmp2", tmp_path / ".x.tmp", tmp_path / ".y.12.tmp"]
    for path in (left, *others):
        path.write_text("x")
    write_text(tmp_path / "z.json", "{}")
    assert not left.exists()
    assert all(path.is_file() for path in others)


@pytest.mark.parametrize(
    "name",
    [
        STATES,
        "calibration/m/.c.partial",
        "calibration/m/c/inputs",
        "calibration/m/c/.gradients.partial",
        "gguf/.x.partial",
    ],
)
def test_what_nobody_resumes_for_a_week_is_removed(name: str, cache: Path) -> None:
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "large").write_text("x")
    sweep(None)
    assert folder.is_dir(), "somebody may go on with it"
    age(folder)
    with FileLock(folder.parent / ".some.lock"):
        sweep(None)
        assert folder.is_dir(), "somebody is at it"
    sweep(None)
    assert not folder.exists()


def test_a_lock_that_a_killed_evaluation_left_is_removed(cache: Path) -> None:
    lock = cache / "evaluations" / ".states.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        sweep(None)
        assert lock.is_file()
    lock.touch()
    sweep(None)
    assert not lock.exists()


def test_a_folder_that_cannot_be_used_names_the_lever(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="for temporary files") as caught:  # noqa: SIM117
        with scratch_folder(str(tmp_path / "file" / "x")):
            pass
    assert "`model.scratch`" in caught.value.hint
    assert "HISVD_CACHE" in caught.value.hint


@pytest.mark.parametrize("command", ["eval", "convert"])
def test_a_killed_command_leaves_one_folder_which_the_next_removes(
    command: str, single: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    more: dict[str, list[object]] = {
        "eval": ["--windows", 400, "--seqlen", 64, "--quiet"],
        "convert": ["--to", "dense", "--output", "dense"],
    }
    words: list[object] = [command, single, *more[command], "--scratch", "large"]
    env = {"HISVD_CACHE": str(tmp_path / "cache"), "TMPDIR": str(temporary)}
    with running(*words, cwd=tmp_path, env=env) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "large").glob("hisvd-*/unpacked")):
            partial = list((tmp_path / "large").glob("hisvd-*/.unpacked.partial"))
            if partial:
                break
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(list((tmp_path / "large").iterdir())) == 1
    assert not list(temporary.iterdir())
    done = script("inspect", single, "--set", "model.scratch=large", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "large").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".hisvd")]


def test_a_finished_output_clears_what_other_settings_left_beside_it(tmp_path: Path) -> None:
    work = tmp_path / ".out.hisvd.work"
    theirs = [".out.folder", ".out.work", ".outer.hisvd.work", "out.hisvd.work"]
    for name in ["untrained", "unquantized", "stages/stage-1", ".final.partial"]:
        (work / name).mkdir(parents=True)
    for name in theirs:
        (tmp_path / name).mkdir()
    (work / "untrained" / "hisvd.json").write_text("{}")
    (work / ".final.hisvd.key").write_text("x")
    with FileLock(work / ".final.hisvd.lock"):
        clear_beside(tmp_path / "out")
        assert (work / "untrained").is_dir(), "somebody is at it"
    clear_beside(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


# A cache that cannot be written


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Put a file where the cache would be: as root, permissions bind nobody."""
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("no folder")
    try:
        yield
    finally:
        path.unlink()


@pytest.mark.slow
def test_optional_records_of_an_unwritable_cache_are_skipped(
    single: Path, cache: Path, tmp_path: Path
) -> None:
    made = ("--calibration", tmp_path / "calibration")
    quick = ("--model", "demo", *made)
    succeed("calibrate", *QUICK, *made)
    succeed("convert", single, "--to", "hf", "--output", tmp_path / "low")
    windows = ("--windows", 4, "--seqlen", 64)
    before = succeed("eval", tmp_path / "low", *windows, "--quiet").stdout
    with unwritable(cache):
        succeed("inspect", tmp_path / "low")
        succeed("plan", *quick)
        assert succeed("eval", tmp_path / "low", *windows, "--quiet").stdout == before
        succeed("eval", tmp_path / "low", *windows, "--fresh", "--quiet")
        output = ("--no-evaluate", "--output", tmp_path / "made")
        succeed("compress", *quick, "--ratio", 0.5, *output)
        succeed("convert", single, "--to", "hf", "--output", tmp_path / "hf")
        scratch = ("--scratch", tmp_path / "s")
        succeed("eval", tmp_path / "low", "--baseline", "demo", *windows, *scratch)
        assert cache_root().is_file()


def test_needed_records_of_an_unwritable_cache_name_the_variable(
    single: Path, cache: Path, tmp_path: Path
) -> None:
    with unwritable(cache):
        _, hint = fail("calibrate", *QUICK)
        assert "HISVD_CACHE" in hint
        _, hint = fail("convert", single, "--to", "dense", "--output", tmp_path / "dense")
        assert "HISVD_CACHE" in hint
        assert "--scratch" in hint
