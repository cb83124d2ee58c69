"""What stands at an output, or is an input, is never lost: each command, by hashes of files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hisvd_cli.utils.files.artifact import building
from tests.cli_helpers import (
    QUICK,
    as_json,
    digests,
    fail,
    hisvd,
    script,
    succeed,
    text_file,
    untouched,
)
from tests.conftest import MakeModel

pytestmark = pytest.mark.usefixtures("here")
COMPRESS = ("compress", *QUICK, "--ratio", 0.6, "--no-evaluate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its dense form, a .pt file and a plan; do not edit it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        succeed(*COMPRESS, "--output", "ck")
        succeed("convert", "ck", "--to", "dense", "--output", "dense")
        succeed("convert", "ck", "--to", "pt", "--output", "ck.pt")
        succeed("plan", *QUICK, "--ratio", 0.4, "--output", "plan.json")
    return folder


@pytest.fixture
def own(made: Path, here: Path) -> Path:
    """A copy of ``made`` in the current folder."""
    for name in ("ck", "dense"):
        (here / name).mkdir()
        for path in (made / name).iterdir():
            (here / name / path.name).write_bytes(path.read_bytes())
    for name in ("ck.pt", "plan.json"):
        (here / name).write_bytes((made / name).read_bytes())
    return here


@pytest.mark.parametrize("output", ["dense", "dense/", "dense/out", ".", "link", "link/x"])
def test_an_output_at_the_model_is_refused(output: str, own: Path) -> None:
    (own / "link").symlink_to("dense")
    words = ("--model", "dense", "--dataset", "demo", "--samples", 4, "--seqlen", 32)
    message, _ = untouched(own, "compress", *words, "--output", output, "--overwrite")
    assert "the input dense" in message


def test_an_output_above_the_model_is_refused(own: Path) -> None:
    (own / "dense").rename(own / "ck" / "dense")
    words = ("--model", "ck/dense", "--dataset", "demo", "--samples", 4, "--seqlen", 32)
    message, _ = untouched(own, "compress", *words, "--output", "ck", "--overwrite")
    assert "contains the input" in message


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "ck", "--to", "hf", "--output", "ck"),
        ("convert", "ck", "--to", "dense", "--output", "ck/dense"),
        ("convert", "ck.pt", "--to", "pt", "--output", "ck.pt"),
        ("convert", "ck.pt", "--to", "pt", "--output", "hard.pt"),
        ("convert", "ck", "--quantize", "int8", "--output", "ck"),
        ("compress", "--from", "ck", "--recover", "distill", "--output", "ck"),
    ],
)
def test_an_output_at_a_checkpoint_that_is_read_is_refused(
    words: tuple[object, ...], own: Path
) -> None:
    os.link(own / "ck.pt", own / "hard.pt")
    message, _ = untouched(own, *words, "--overwrite")
    assert "the input" in message


@pytest.mark.parametrize("record", ["{}", "[]", "", '{"kind": "checkpoint"}', '{"kind": "plan"}'])
def test_a_folder_with_any_hisvd_json_is_not_ours(record: str, here: Path) -> None:
    home = here / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "a.png").write_bytes(b"1")
    (home / "hisvd.json").write_text(record)
    message, _ = untouched(here, *COMPRESS, "--output", home, "--overwrite")
    assert "hisvd did not write" in message


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "sub/model.safetensors", ".env"])
def test_what_lies_beside_a_checkpoint_is_kept(name: str, own: Path) -> None:
    (own / "ck" / name).parent.mkdir(exist_ok=True)
    (own / "ck" / name).write_text("mine")
    message, hint = untouched(own, *COMPRESS, "--output", "ck", "--overwrite")
    assert name.split("/", maxsplit=1)[0] in message
    assert "Move it" in hint


@pytest.mark.parametrize("name", ["LICENSE", "vocab.txt", "own.py", "README.md", "lowrank.py"])
def test_a_file_by_the_name_of_one_of_ours_is_kept(name: str, own: Path) -> None:
    path = own / "ck" / name
    known = path.exists()
    path.write_text("mine")
    message, _ = untouched(own, *COMPRESS, "--output", "ck", "--overwrite")
    how = "was changed since hisvd wrote it" if known else "hisvd did not write"
    assert message == f"The folder ck also contains {name}, which {how}."


def test_a_folder_with_the_record_of_a_checkpoint_is_not_ours(own: Path) -> None:
    (own / "mine").mkdir()
    shutil.copyfile(own / "ck" / "hisvd.json", own / "mine" / "hisvd.json")
    for name in ("README.md", "config.json", "model.safetensors.index.json"):
        (own / "mine" / name).write_text("{}")
        untouched(own, *COMPRESS, "--output", "mine", "--overwrite")
        (own / "mine" / name).unlink()


def test_a_card_with_new_results_is_still_ours(own: Path) -> None:
    text_file(own, words=400).rename("t.txt")
    succeed("eval", "ck", "--dataset", "t.txt", "--seqlen", 32, "--update-card")
    succeed(*COMPRESS, "--output", "ck", "--overwrite")
    card = own / "ck" / "README.md"
    card.write_text(card.read_text() + "mine")
    succeed("eval", "ck", "--dataset", "t.txt", "--seqlen", 32, "--update-card")
    untouched(own, *COMPRESS, "--output", "ck", "--overwrite")


def test_a_checkpoint_of_an_older_hisvd_is_still_replaced(own: Path) -> None:
    record = json.loads((own / "ck" / "hisvd.json").read_text())
    del record["files"]
    (own / "ck" / "hisvd.json").write_text(json.dumps(record))
    succeed(*COMPRESS, "--output", "ck", "--overwrite")
    assert "files" in json.loads((own / "ck" / "hisvd.json").read_text())


def test_a_checkpoint_is_still_replaced(own: Path) -> None:
    before = digests(own / "ck")
    succeed(*COMPRESS[:-3], "--ratio", 0.5, "--no-evaluate", "--output", "ck", "--overwrite")
    assert json.loads((own / "ck" / "hisvd.json").read_text())["ratio"] == 0.5
    assert digests(own / "ck").keys() == before.keys()


@pytest.mark.parametrize("name", ["x.pt", "x.plan.json"])
def test_a_single_file_replaces_only_its_own_kind(name: str, here: Path) -> None:
    (here / name).write_bytes(b"mine")
    message, _ = untouched(here, *COMPRESS, "--output", "x.pt", "--overwrite")
    assert name in message


def test_what_was_put_into_a_folder_during_the_run_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "old").write_text("1")
    with building(folder, "key") as partial:
        (partial / "new").write_text("2")
        (partial / "both").write_text("3")
        (folder / "notes").write_text("mine")
        (folder / "both").write_text("mine too")
    assert sorted(path.name for path in folder.iterdir()) == ["both", "both.1", "new", "notes"]
    assert (folder / "both.1").read_text() == "mine too"


def test_a_run_killed_while_its_folder_takes_the_name_loses_nothing(tmp_path: Path) -> None:
    old = tmp_path / ".x.hisvd.old"
    old.mkdir()
    (old / "mine").write_text("1")
    with pytest.raises(RuntimeError), building(tmp_path / "x", "key"):
        raise RuntimeError
    assert (tmp_path / "x" / "mine").read_text() == "1"


@pytest.mark.parametrize("kind", ["fifo", "socket"])
@pytest.mark.parametrize("command", ["compress", "convert", "calibrate"])
def test_folders_refuse_what_is_no_folder(kind: str, command: str, own: Path) -> None:
    os.mknod(own / "x", (stat.S_IFIFO if kind == "fifo" else stat.S_IFSOCK) | 0o600)
    words = {
        "compress": (*COMPRESS, "--output", "x", "--overwrite"),
        "convert": ("convert", "ck", "--to", "hf", "--output", "x", "--overwrite"),
        "calibrate": ("calibrate", *QUICK, "--calibration", "x"),
    }
    fail(*words[command])
    assert not stat.S_ISREG((own / "x").stat().st_mode)
    assert not (own / ".x.hisvd.old").exists()


@pytest.mark.parametrize("flag", ["--csv", "--markdown", "--report"])
def test_reports_replace_nothing_but_reports(flag: str, own: Path) -> None:
    words = ("eval", "demo", "--windows", 1, "--seqlen", 16, flag)
    for name in ("dense/config.json", "ck.pt", "dense/README.md"):
        message, _ = untouched(own, *words, name)
        assert "not a report of this kind" in message
    succeed(*words, "mine")
    succeed(*words, "mine")


@pytest.mark.parametrize("flag", ["--csv", "--markdown"])
def test_reports_are_written_through_to_devices_and_links(flag: str, here: Path) -> None:
    words = ("eval", "demo", "--windows", 1, "--seqlen", 16, flag)
    succeed(*words, "/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    (here / "link").symlink_to("target")
    succeed(*words, "link")
    assert (here / "link").is_symlink()
    assert (here / "target").read_text()


def test_a_plan_is_written_through_to_a_device(here: Path) -> None:
    done = script("plan", *QUICK, "--ratio", 0.6, "--output", "/dev/null", cwd=here)
    assert done.returncode == 0, done.stderr
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_the_plan_of_a_checkpoint_is_not_replaced(own: Path) -> None:
    message, _ = untouched(own, "plan", *QUICK, "--output", "ck/plan.json")
    assert "the plan of the checkpoint" in message


def test_two_reports_with_one_name_are_refused(here: Path) -> None:
    words = ("eval", "demo", "--windows", 1, "--seqlen", 16)
    message, _ = fail(*words, "--csv", "x", "--markdown", here / "x", code=2)
    assert "same name" in message


def test_a_checkpoint_by_a_plan_is_named_after_its_ratio(own: Path) -> None:
    made = as_json("compress", *QUICK, "--plan", "plan.json", "--no-evaluate")
    assert made["output"] == "demo-0.4"
    assert (own / "demo-0.4" / "config.json").is_file()


def test_ratios_that_differ_late_get_names_of_their_own(here: Path) -> None:
    words = ("--ratio", 0.6, "--ratio", 0.6000001, "--ratio", 0.5, "--no-evaluate")
    cells = as_json("compress", *QUICK, *words)["cells"]
    assert [cell["output"] for cell in cells] == ["demo-0.6", "demo-0.6000001", "demo-0.5"]
    assert all((here / cell["output"]).is_dir() for cell in cells)


def _loop(here: Path) -> str:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    return "a"


NAMES: dict[str, Callable[[Path], str]] = {
    "root": lambda _: "/",
    "loop": _loop,
    "no such user": lambda _: "~nosuchuser/x",
    "no such user's": lambda _: "~nosuchuser",
    "240 bytes": lambda _: "x" * 240,
    "255 bytes": lambda _: "é" * 127,
    "300 bytes": lambda _: "x" * 300,
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    "words",
    [
        (*COMPRESS, "--output"),
        ("convert", "absent", "--to", "dense", "--output"),
        ("plan", *QUICK, "--output"),
        ("calibrate", *QUICK, "--calibration"),
        ("eval", "demo", "--windows", 1, "--csv"),
    ],
    ids=lambda words: str(words[0]),
)
def test_names_that_cannot_be_are_found_before_the_work(
    kind: str, words: tuple[object, ...], here: Path
) -> None:
    name = NAMES[kind](here)
    result = hisvd(*words, name + (".json" if words[0] == "plan" and len(name) > 99 else ""))
    assert result.exit_code in (1, 2)
    assert "Internal error" not in result.stderr
    assert "Calibrating" not in result.stderr
    assert "Evaluating" not in result.stderr


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.PT", "x.safetensors", "x.gguf", "x.json"])
def test_names_of_files_become_no_folders(name: str, here: Path) -> None:
    message, hint = fail(*COMPRESS, "--output", name, code=2)
    assert name in message
    assert ".pt" in hint
    assert not list(here.iterdir())


def test_the_home_folder_is_expanded(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    succeed("convert", "ck", "--to", "dense", "--output", "~/d")
    succeed("plan", *QUICK, "--output", "~/p.json")
    succeed("eval", "demo", "--windows", 1, "--seqlen", 16, "--csv", "~/t.csv")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"d", "p.json", "t.csv"}
    assert not (own / "~").exists()


def test_a_model_that_is_not_ours_is_an_input_too(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    words = ("--model", model, "--dataset", "demo", "--samples", 4, "--seqlen", 32)
    message, _ = untouched(model, "compress", *words, "--output", model, "--overwrite")
    assert "is the input" in message
