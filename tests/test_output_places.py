"""Section 2 of issue 16, the places of outputs: what a run makes, reads or finds beside its output
is never lost, and a place that cannot be used is found before the work."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from hisvd_cli.pipelines.output_names import check_place
from hisvd_cli.utils.errors import OutputError
from hisvd_cli.utils.files import text_output
from hisvd_cli.utils.files.artifact import building
from hisvd_cli.utils.files.fingerprints import ratio_name, slug
from tests.cli_helpers import (
    QUICK,
    SCRIPT,
    as_json,
    digests,
    fail,
    hisvd,
    script,
    succeed,
    two_lines,
    untouched,
)
from tests.models import names

pytestmark = pytest.mark.usefixtures("here")
COMPRESS = ("compress", *QUICK, "--ratio", 0.6, "--no-evaluate")
EVALUATE = ("eval", "demo", "--windows", 1, "--seqlen", 16)
LESSONS = ("--recover-dataset", "demo", "--recover-samples", 16, "--recover-seqlen", 32)
DISTILL = ("--recover", "distill", "--recover-tokens", 500, *LESSONS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint; do not edit it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        succeed(*COMPRESS, "--output", "ck")
    return folder / "ck"


@pytest.fixture
def own(made: Path, here: Path) -> Path:
    """The current folder, with a copy of the checkpoint ``ck``."""
    shutil.copytree(made, here / "ck")
    return here


# What the run itself makes or reads


@pytest.mark.parametrize(("calibration", "output"), [("out/cal", "out"), ("out", "out")])
def test_a_calibration_that_the_run_makes_is_not_replaced(
    calibration: str, output: str, here: Path
) -> None:
    message, _ = untouched(here, *COMPRESS, "--calibration", calibration, "--output", output)
    assert f"the input {calibration}" in message


def test_an_output_within_the_calibration_that_the_run_makes_is_refused(here: Path) -> None:
    message, _ = untouched(here, *COMPRESS, "--calibration", "cal", "--output", "cal/out")
    assert "is inside the input cal" in message


def test_the_dense_model_of_a_recovered_checkpoint_is_an_input(own: Path) -> None:
    succeed("convert", "ck", "--to", "dense", "--output", "dense")
    words = ("--model", "dense", "--dataset", "demo", "--samples", 8, "--seqlen", 64)
    succeed("compress", *words, "--ratio", 0.6, "--no-evaluate", "--output", "small")
    before = digests(own / "dense")
    message, _ = fail("compress", "--from", "small", *DISTILL, "--output", "dense", "--overwrite")
    assert "is the input dense" in message
    assert digests(own / "dense") == before


@pytest.mark.parametrize("name", [".out.partial", ".out.hisvd.work", ".out.hisvd.old"])
def test_a_folder_that_a_killed_run_left_is_an_input_too(name: str, own: Path) -> None:
    (own / "ck").rename(own / name)
    message, _ = untouched(own, "convert", name, "--to", "hf", "--output", "out")
    assert "would replace the input" in message


def test_a_model_that_is_mounted_twice_is_one_input(own: Path) -> None:
    (own / "other").mkdir()
    bound = subprocess.run(["mount", "--bind", "ck", "other"], check=False, capture_output=True)
    if bound.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        message, _ = untouched(
            own, "convert", "ck", "--to", "dense", "--output", "other/x", "--overwrite"
        )
    finally:
        subprocess.run(["umount", "other"], check=True)
    assert "is inside the input ck" in message


def test_the_plan_that_is_given_may_lie_where_its_copy_goes(own: Path) -> None:
    text = json.dumps(json.loads((own / "ck" / "plan.json").read_text()))
    (own / "x.plan.json").write_text(text)
    plan = ("--plan", own / "x.plan.json")
    succeed("compress", *QUICK, "--no-evaluate", *plan, "--output", "x.pt")
    assert (own / "x.plan.json").read_text() == text
    assert (own / "x.pt").is_file()


# What stands beside an output


@pytest.mark.parametrize("ending", ["key", "lock", "old"])
def test_hidden_files_of_the_user_beside_an_output_are_kept(ending: str, here: Path) -> None:
    mine = here / f".config.{ending}"
    mine.write_text("secret")
    with building(here / "config", "key") as partial:
        (partial / "a").touch()
    assert names(here) == sorted(["config", mine.name])
    assert mine.read_text() == "secret"


def test_a_backup_of_the_user_beside_an_output_is_not_taken_for_the_output(here: Path) -> None:
    (here / ".config.old").mkdir()
    (here / ".config.old" / "mine").write_text("1")
    succeed(*COMPRESS, "--output", "config")
    assert names(here / ".config.old") == ["mine"]


def test_what_a_killed_run_was_about_to_replace_counts_as_standing_there(own: Path) -> None:
    (own / "ck").rename(own / ".ck.hisvd.old")
    message, _ = untouched(own, *COMPRESS, "--output", "ck")
    assert "ck is not empty" in message
    (own / ".ck.hisvd.old" / "notes").write_text("mine")
    message, _ = untouched(own, *COMPRESS, "--output", "ck", "--overwrite")
    assert "also contains notes" in message


@pytest.mark.parametrize("moment", ["old", "new", "removal"])
def test_a_kill_in_the_swap_loses_nothing_that_was_put_there_meanwhile(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before the old folder is renamed, before the new one is, and before the old one goes."""
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").touch()
    rename, rmtree = Path.rename, shutil.rmtree

    def stopping_rename(path: Path, to: Path) -> Path:
        if path.name == {"old": "x", "new": ".x.partial"}.get(moment):
            raise KeyboardInterrupt
        return rename(path, to)

    def stopping_rmtree(path: Path, ignore_errors: bool) -> None:
        if moment == "removal" and path.exists():
            raise KeyboardInterrupt
        rmtree(path, ignore_errors)

    with pytest.raises(KeyboardInterrupt), building(target, "key") as partial:  # noqa: PT012
        (partial / "both").write_text("new")
        (target / "both").write_text("mine")
        (target / ".git").mkdir()
        (target / ".git" / "HEAD").write_text("main")
        monkeypatch.setattr(Path, "rename", stopping_rename)
        monkeypatch.setattr(shutil, "rmtree", stopping_rmtree)
    monkeypatch.undo()
    if moment != "removal":  # else all is done
        with building(target, "key") as partial:
            assert (partial / "both").read_text() == "new"
    assert names(target) == [".git", "both", "both.1"]
    assert (target / "both.1").read_text() == "mine"
    assert (target / ".git" / "HEAD").read_text() == "main"


def test_what_comes_to_stand_at_the_output_during_the_calibration_is_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hisvd_cli.pipelines.calibration import ensure_calibration

    def calibrate(*words: object, **named: object) -> object:
        (here / "out").mkdir()
        (here / "out" / "mine").write_text("1")
        return ensure_calibration(*words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("hisvd_cli.pipelines.compressing.first_stage.ensure_calibration", calibrate)
    message, _ = fail(*COMPRESS, "--output", "out")
    assert "out is not empty" in message
    assert names(here / "out") == ["mine"]


def test_weights_that_the_index_does_not_list_are_not_ours(own: Path) -> None:
    (own / "ck" / "model-00001-of-00002.safetensors").write_bytes(b"mine")
    message, _ = untouched(own, *COMPRESS, "--output", "ck", "--overwrite")
    assert "also contains model-00001-of-00002.safetensors" in message


def test_a_checkpoint_in_shards_is_replaced(own: Path) -> None:
    words = ("convert", "ck", "--to", "hf", "--output", "shards", "--max-shard-size", 0.001)
    succeed(*words)
    assert (own / "shards" / "model.safetensors.index.json").is_file()
    succeed(*words, "--overwrite")


# Places that cannot be used


@pytest.mark.parametrize("output", ["", ".", "..", "../here"])
@pytest.mark.parametrize("kind", ["compress", "convert", "calibrate", "recover"])
def test_the_current_folder_is_refused_before_the_work(
    kind: str, output: str, made: Path, here: Path
) -> None:
    words: tuple[object, ...] = {
        "compress": (*COMPRESS, "--output"),
        "convert": ("convert", made, "--to", "dense", "--output"),
        "calibrate": ("calibrate", *QUICK, "--calibration"),
        "recover": ("compress", "--from", made, *DISTILL, "--output"),
    }[kind]
    if kind == "calibrate" and output in ("", ".."):  # the first names no folder
        return
    message, hint = fail(*words, output)
    assert "current folder" in message
    assert "--output" in hint or "--calibration" in hint
    assert not list(here.iterdir())


def test_a_mount_point_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    message, hint = untouched(here, *COMPRESS, "--output", "volume")
    assert "mount point" in message
    assert "Name a folder in it" in hint


def test_a_link_into_a_folder_that_takes_no_files_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "locked").mkdir()
    (here / "link").symlink_to("locked/out")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode)
    )
    with pytest.raises(OutputError, match=r"Cannot write into .*locked"):
        check_place(here / "link")


def test_a_default_name_is_short_enough(here: Path) -> None:
    from hisvd_cli.modeling.sources.source import DEMO_FOLDER

    model = here / ("m" * 250)
    shutil.copytree(DEMO_FOLDER, model)
    words = ("--model", model.name, "--dataset", "demo", "--samples", 8, "--seqlen", 64)
    output = as_json("compress", *words, "--ratio", 0.6, "--no-evaluate")["output"]
    assert output == f"{'m' * 100}-0.6"
    assert (here / output / "config.json").is_file()
    assert len(slug("m" * 250)) == 100


def test_a_path_that_is_too_long_is_found_before_the_work(here: Path) -> None:
    name = "/".join(["x" * 180] * 21)
    message, _ = untouched(here, *COMPRESS, "--output", name)
    assert "too long" in message


def test_a_checkpoint_that_is_the_current_folder_can_be_recovered(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own / "ck")
    made = as_json("compress", "--from", ".", *DISTILL)
    assert Path(made["output"]) == own / "ck-distill"


@pytest.mark.parametrize("name", ["c.safetensors", "c.pt", "c.PTH", "c.json"])
def test_the_name_of_a_file_becomes_no_calibration(name: str, here: Path) -> None:
    message, _ = fail("calibrate", *QUICK, "--calibration", name, code=2)
    assert name in message
    assert not list(here.iterdir())


def test_the_name_of_a_file_becomes_no_folder_of_several_checkpoints(here: Path) -> None:
    words = (*COMPRESS, "--ratio", 0.5, "--output")
    message, _ = fail(*words, "several.bin", code=2)
    assert "several.bin ends in .bin" in message
    assert not list(here.iterdir())


def test_inputs_in_the_home_folder_are_expanded(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(own / "ck", home / "ck")
    monkeypatch.setenv("HOME", str(home))
    succeed("convert", "~/ck", "--to", "pt", "--output", "~/x.pt")
    succeed("compress", *QUICK, "--no-evaluate", "--plan", "~/ck/plan.json", "--output", "~/y")
    succeed("compress", "--from", "~/ck", *DISTILL, "--output", "~/z")
    assert names(home) == ["ck", "x.pt", "y", "z"]


# Links, devices and streams


def test_a_link_to_a_single_file_stays_a_link(own: Path) -> None:
    words = ("convert", "ck", "--to", "pt", "--output")
    succeed(*words, "real.pt")
    (own / "link.pt").symlink_to("real.pt")
    before = (own / "real.pt").stat().st_ino
    succeed(*words, "link.pt", "--overwrite")
    assert (own / "link.pt").is_symlink()
    assert (own / "real.pt").stat().st_ino != before


def test_a_link_to_the_plan_of_a_checkpoint_is_refused(own: Path) -> None:
    (own / "mine.json").symlink_to("ck/plan.json")
    message, _ = untouched(own, "plan", *QUICK, "--output", "mine.json")
    assert "the plan of the checkpoint" in message


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--csv", "model,dataset,accuracy\nmine,c4,1\n"),
        ("--markdown", "| model | dataset | notes |\n"),
        (
            "--report",
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Thesis',
        ),
    ],
)
def test_files_that_begin_much_like_a_report_are_kept(flag: str, text: str, here: Path) -> None:
    (here / "mine").write_text(text)
    message, _ = untouched(here, *EVALUATE, flag, "mine")
    assert "not a report of this kind" in message


def test_each_report_replaces_the_one_of_before(here: Path) -> None:
    reports = ("--csv", "a.csv", "--markdown", "a.md", "--report", "a.html")
    succeed(*EVALUATE, *reports)
    before = digests(here)
    for path in here.glob("a.*"):
        path.write_text(path.read_text(encoding="utf-8") + "x", encoding="utf-8")
    succeed(*EVALUATE, *reports)
    assert digests(here) == before


def test_a_report_to_stdout_keeps_what_stdout_holds(here: Path) -> None:
    """Where stdout is a file, ``/dev/stdout`` is that file, which must not be replaced."""
    log = here / "log.txt"
    log.write_text("before\n")
    command = 'exec "$0" eval demo --windows 1 --seqlen 16 --quiet --csv /dev/stdout >> log.txt'
    done = subprocess.run(["sh", "-c", command, SCRIPT], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1].startswith("model,dataset,perplexity")
    assert lines[-1].replace(".", "").isdigit()


@pytest.mark.slow
def test_a_plan_to_stdout_is_a_plan(here: Path) -> None:
    command = 'exec "$0" plan --model demo --quiet --output /dev/stdout > out.txt'
    done = subprocess.run(["sh", "-c", command, SCRIPT], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (here / "out.txt").read_text().startswith('{\n  "kind": "plan"')


def test_a_report_goes_through_a_pipe(here: Path) -> None:
    os.mkfifo(here / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((here / "pipe").read_text()), daemon=True)
    reader.start()
    succeed(*EVALUATE, "--csv", "pipe")
    reader.join(timeout=60)
    assert read[0].startswith("model,dataset,perplexity")
    assert (here / "pipe").is_fifo()


WRITING = [(*EVALUATE, "--csv"), ("plan", *QUICK, "--output")]


@pytest.mark.parametrize("words", WRITING)
def test_a_pipe_that_nobody_reads_is_refused_before_the_work(
    words: tuple[object, ...], here: Path
) -> None:
    os.mkfifo(here / "pipe")
    done = script(*words, "pipe", cwd=here)
    assert done.returncode == 1
    assert "No process reads the named pipe pipe." in two_lines(done.stderr)[0]
    assert "Evaluating" not in done.stderr


def test_a_pipe_is_written_once_it_is_read(here: Path) -> None:
    """A reader that starts a moment later is waited for, and gets a second text too."""
    os.mkfifo(here / "pipe")
    for text in ("one", "two"):
        later = 'sleep 0.3; exec cat "$0"'
        with subprocess.Popen(
            ["sh", "-c", later, here / "pipe"], stdout=subprocess.PIPE, text=True
        ) as reader:
            text_output.check_text_place(here / "pipe", "`csv`")
            text_output.check_text_place(here / "pipe", "`csv`")
            text_output.write_through(here / "pipe", text)
            assert reader.communicate(timeout=60)[0] == text


@pytest.mark.parametrize("words", WRITING)
def test_a_socket_is_refused_before_the_work(words: tuple[object, ...]) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind("s")
        result = hisvd(*words, "s")
    assert result.exit_code == 1
    assert "neither a file nor a pipe" in result.stderr
    assert "Evaluating" not in result.stderr


def test_a_plan_in_a_file_is_refused_before_the_work(here: Path) -> None:
    (here / "file").write_text("mine")
    message, _ = untouched(here, "plan", *QUICK, "--output", "file/p.json")
    assert "file is not writable" in message


def test_a_device_needs_no_folder_that_takes_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root may write into /dev, and everybody to /dev/null."""
    monkeypatch.setattr(os, "access", lambda path, _: str(path) != "/dev")
    text_output.check_text_place(Path("/dev/null"), "`csv`")
    text_output.write_through(Path("/dev/null"), "x")


# Names of ratios


def test_every_ratio_has_a_name_of_its_own() -> None:
    ratios = [0.6, 0.6000001, 0.60000011, 1 / 3, 0.8, 1.0]
    assert [ratio_name(ratio) for ratio in ratios] == [
        *("0.6", "0.6000001", "0.60000011", "0.3333333333333333", "0.8", "1"),
    ]


def test_the_next_command_of_a_plan_makes_that_plan(here: Path) -> None:
    done = script("plan", *QUICK, "--ratio", 0.6000001, "--output", "/dev/null", cwd=here)
    assert "--ratio 0.6000001" in done.stderr + done.stdout
    assert "/dev/null" not in done.stderr + done.stdout
