"""Folders that appear only when complete."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hisvd_cli.utils.errors import OutputError, SourceError
from hisvd_cli.utils.files.artifact import building, partial_path
from hisvd_cli.utils.files.atomic import write_text
from hisvd_cli.utils.files.cache import cache_root
from tests.models import names


def test_a_folder_appears_when_complete_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model-0.6"
    with building(target, "key") as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["model-0.6"]  # no lock, no key, no temporary folder


def test_what_stands_there_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").touch()
    with building(target, "key") as partial:
        (partial / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["x"]


def interrupted(target: Path, key: str) -> None:
    with pytest.raises(RuntimeError, match="stop"), building(target, key) as partial:  # noqa: PT012
        (partial / "done").write_text(key)
        (partial / ".half.123.tmp").touch()
        raise RuntimeError("stop")


def test_an_interrupted_run_leaves_no_folder_and_is_continued(tmp_path: Path) -> None:
    target = tmp_path / "x"
    interrupted(target, "key")
    assert not target.exists()
    assert not (tmp_path / ".x.hisvd.lock").exists()
    with building(target, "key") as partial:
        assert names(partial) == ["done"]  # and nothing of a file that was being written
    assert names(target) == ["done"]
    assert names(tmp_path) == ["x"]


def test_a_run_with_another_key_starts_afresh(tmp_path: Path) -> None:
    interrupted(tmp_path / "x", "key")
    with building(tmp_path / "x", "other") as partial:
        assert names(partial) == []


def test_a_folder_of_unknown_origin_is_not_continued(tmp_path: Path) -> None:
    partial_path(tmp_path / "x").mkdir()
    (partial_path(tmp_path / "x") / "stray").touch()
    with building(tmp_path / "x", "key") as partial:
        assert names(partial) == []


def test_two_runs_in_one_process_do_not_meet(tmp_path: Path) -> None:
    with building(tmp_path / "x", "key") as partial:
        with pytest.raises(OutputError, match="Another hisvd run is writing") as caught:
            building(tmp_path / "x", "key").__enter__()
        assert "Wait" in caught.value.hint
        (partial / "a").touch()
    assert names(tmp_path / "x") == ["a"]


HOLD = """
import sys, time
from pathlib import Path
from hisvd_cli.utils.files.artifact import building
with building(Path(sys.argv[1]), "key") as partial:
    (partial / "done").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_another_process_holds_the_folder_until_it_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "x"
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(OutputError, match="Another hisvd run is writing"):
            building(target, "key").__enter__()
        process.send_signal(signal.SIGKILL)
    with building(target, "key") as partial:  # the dead process's lock is no lock
        assert names(partial) == ["done"]
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_while_the_folder_takes_its_name_loses_nothing(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is renamed, the new one is, the key is removed: stop before each of them."""
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").touch()
    calls = 0
    rename, unlink = Path.rename, Path.unlink

    def count(path: Path) -> None:
        nonlocal calls
        if path.name in {"x", ".x.partial", ".x.hisvd.key"}:
            calls += 1
            if calls >= moment:
                raise KeyboardInterrupt

    def stopping_rename(self: Path, to: Path) -> Path:
        count(self)
        return rename(self, to)

    def stopping_unlink(self: Path, missing_ok: bool = False) -> None:
        count(self)
        unlink(self, missing_ok)

    with pytest.raises(KeyboardInterrupt), building(target, "key") as partial:  # noqa: PT012
        (partial / "new").touch()
        monkeypatch.setattr(Path, "rename", stopping_rename)
        monkeypatch.setattr(Path, "unlink", stopping_unlink)
    monkeypatch.undo()
    if moment < 3:
        with building(target, "key") as partial:
            assert names(partial) == ["new"]
    assert names(target) == ["new"]


def test_errors_of_the_body_pass_and_those_of_the_disk_are_explained(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="mine"), building(tmp_path / "x", "key"):
        raise SourceError("mine")
    with pytest.raises(OutputError, match="No space left") as caught, building(tmp_path / "x", "k"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "Free some space" in caught.value.hint


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_the_hint_follows_the_cause(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    full, cache = code == errno.ENOSPC, cache_root()
    for path, remedy in (
        (
            cache / "x" / "y.json",
            f"Free some space in {cache}" if full else f"permissions of {cache}",
        ),
        (tmp_path / "y.json", "Free some space or" if full else f"permissions of {tmp_path}"),
    ):
        with pytest.raises(OutputError) as caught:
            write_text(path, "text")
        assert os.strerror(code) in caught.value.message
        assert remedy in caught.value.hint
        with pytest.raises(OutputError) as caught, building(path, "key"):
            pass
        assert remedy in caught.value.hint


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"), building(tmp_path / "file" / "x", "key"):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_takes_no_new_files_is_not_called_locked() -> None:
    with (
        pytest.raises(OutputError, match=r"Cannot (create files|write)"),
        building(Path("/proc/hisvd-test"), "key"),
    ):
        raise AssertionError
