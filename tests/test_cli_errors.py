"""Bad input: two clear lines, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli_helpers import (
    QUICK,
    digests,
    fail,
    hisvd,
    script,
    succeed,
    text_file,
    two_lines,
)
from tests.conftest import MakeModel
from tests.models import edit_json

RATIO_HINT = "0.6 keeps 60 %"


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def model(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    return folder


@pytest.fixture
def quick(model: Path, tmp_path: Path) -> tuple[object, ...]:
    """Flags of a calibration that takes a moment."""
    text = text_file(tmp_path)
    return ("--model", model, "--dataset", text, "--samples", 4, "--seqlen", 32)


def nothing_made(here: Path) -> bool:
    return not any(here.iterdir())


@pytest.mark.parametrize("command", ["calibrate", "plan", "compress"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "No model is named."),
        ("./absent", "No model at './absent'"),
        ("absent.gguf", "No model at 'absent.gguf'"),
        ("nobody/no-such-model", "nobody/no-such-model"),
    ],
)
def test_an_unknown_model(command: str, name: str, told: str, here: Path) -> None:
    message, hint = fail(command, "--model", name, code=1 if name else 2)
    assert told in message
    assert hint
    assert nothing_made(here)


@pytest.mark.parametrize("ratio", ["0", "-0.5", "1.01", "60", "nan", "inf"])
def test_a_ratio_outside_its_bounds(ratio: str, here: Path) -> None:
    message, hint = fail("compress", *QUICK, f"--ratio={ratio}", code=2)
    assert message.startswith(f"--ratio {ratio} must be ")
    assert RATIO_HINT in hint
    assert nothing_made(here)


def test_a_ratio_outside_its_bounds_from_anywhere(here: Path) -> None:
    message, hint = fail("plan", *QUICK, code=2, env={"HISVD_PLAN_RATIO": "60"})
    assert message == "HISVD_PLAN_RATIO=60 must be above 0 and at most 1."
    assert RATIO_HINT in hint
    profile = here / "hisvd.toml"
    profile.write_text("[plan]\nratio = 60\n")
    message, hint = fail("plan", *QUICK, code=2)
    assert message == f"{profile}: plan.ratio = 60 must be above 0 and at most 1."
    assert RATIO_HINT in hint


def test_all_errors_of_a_profile_at_once(here: Path) -> None:
    (here / "hisvd.toml").write_text(
        '[plan]\nratio = "0.6"\nrank_method = "stabel"\nalfa = 1\n[modle]\nname = "demo"\n'
    )
    result = hisvd("compress", "--model", "demo")
    assert result.exit_code == 2
    *errors, hint = result.stderr.splitlines()
    assert [line.split("hisvd.toml: ")[1] for line in errors] == [
        'plan.ratio = "0.6" must be a number, without quotes.',
        "plan.rank_method = \"stabel\" must be 'stable', 'effective' or 'mathematical'. "
        "Did you mean 'stable'?",
        "plan.alfa: no such setting. Did you mean 'alpha'?",
        "modle: no such setting. Did you mean 'model'?",
    ]
    assert all(line.startswith("Error: ") for line in errors)
    assert hint.startswith("Hint: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("plan", "--modle", "demo"), "--modle"),
        (("pln",), "Did you mean 'plan'?"),
        (("convert", "x", "--output", "y"), "--output without --to"),
        (("convert", "x", "--output", "y", "--to", "gguf"), "'gguf' is not one of"),
        (("inspect",), "TARGET"),
        (("plan", *QUICK, "--samples", "many"), "--samples many must be a whole number"),
        (("plan", *QUICK, "--set", "plan.alpa=1"), "Did you mean 'plan.alpha'?"),
        (("plan", *QUICK, "--allocator", "hsvd"), "hsvd"),
        (("compress", *QUICK, "--decomposer", "whitend"), "whitend"),
        (("compress", *QUICK, "--allocator", "hisvd", "--allocator", "swift"), "one --allocator"),
        (
            ("compress", *QUICK, "--ratio", "0.5", "--ratio", "0.6", "-o", "x.pt"),
            "x.pt is a single file",
        ),
        (("plan", *QUICK, "--preset", "best", "--preset", "hisvd"), "best, hisvd. Only compress"),
        (("plan", *QUICK, "--exclude", "w_proj"), "w_proj"),
        (("plan", *QUICK, "--ratio", "0.5", "--ratio", "0.6", "-o", "p.json"), "2 ratios"),
        (("plan", *QUICK, "--output", "plan.txt"), "plan.txt"),
        (("plan", *QUICK, "--device", "gpu"), "gpu"),
        (("plan", "--profile", "absent.toml"), "absent.toml"),
        (("eval",), "No model is named."),
    ],
)
def test_wrong_usage(words: tuple[object, ...], told: str, here: Path) -> None:
    message, _ = fail(*words, code=2)
    assert told in message
    assert nothing_made(here)


@pytest.mark.parametrize(
    "words",
    [
        ("--ratio-of", "model", "--ratio", "0.1"),
        ("--multiple-of", "64", "--ratio", "0.1"),
    ],
)
def test_a_budget_that_cannot_be_met_stops_before_the_calibration(
    words: tuple[str, ...], quick: tuple[object, ...], here: Path
) -> None:
    result = hisvd("compress", *quick, *words)
    assert result.exit_code == 1
    assert "Calibrating" not in result.stderr
    two_lines(result.stderr)
    assert nothing_made(here)


def test_a_calibration_for_another_model(
    quick: tuple[object, ...], tiny_model: MakeModel, here: Path, tmp_path: Path
) -> None:
    made = tmp_path / "calibration"
    succeed("calibrate", *quick, "--calibration", made)
    before = digests(made)
    other = ("--model", tiny_model("llama_untied"), *quick[2:])
    for command in ("calibrate", "plan", "compress"):
        message, _ = fail(command, *other, "--calibration", made)
        assert "is the calibration of" in message
    message, _ = fail("plan", *quick, "--calibration", made, "--samples", 5)
    assert "--samples 4, not 5" in message
    assert digests(made) == before
    assert nothing_made(here)


def test_a_calibration_that_is_not_there(quick: tuple[object, ...], here: Path) -> None:
    message, hint = fail("plan", *quick, "--calibration", "absent")
    assert "'absent'" in message
    assert "hisvd calibrate" in hint
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("keep")
    for command in ("calibrate", "compress"):
        message, _ = fail(command, *quick, "--calibration", "mine")
        assert "mine holds something that is not a calibration" in message
    assert digests(here).keys() == {"mine/notes.txt"}


def test_too_few_tokens_for_a_window(
    model: Path, quick: tuple[object, ...], here: Path, tmp_path: Path
) -> None:
    short = text_file(tmp_path, words=20, seed=1)
    words = ("--model", model, "--seqlen", 64)
    message, hint = fail("compress", *words, "--dataset", short)
    assert "fewer than one window of 64" in message
    assert "--seqlen" in hint
    message, _ = fail("eval", model, "--dataset", short, "--seqlen", 64)
    assert "fewer than one window of 64" in message
    # What would only fail after the compression is found before it.
    evaluating = ("--evaluate", "--set", f"eval.dataset={short}", "--set", "eval.seqlen=64")
    message, _ = fail("compress", *quick, *evaluating)
    assert "fewer than one window of 64" in message
    message, hint = fail("calibrate", *words[:2], "--dataset", short, "--seqlen", 4096)
    assert "128 tokens" in message
    assert "--seqlen to 128" in hint
    assert nothing_made(here)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("blank.txt", b" \n\t\n", "contains no text"),
        ("empty.jsonl", b"", "contains no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("other.jsonl", b'{"id": 3}\n', "no text column; it has id"),
        ("broken.parquet", b"PAR1", "broken.parquet"),
    ],
)
def test_a_file_with_no_text(
    name: str, content: bytes, told: str, model: Path, here: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for words in (("calibrate", "--model", model), ("eval", model)):
        message, _ = fail(*words, "--dataset", path)
        assert told in message
    assert nothing_made(here)


def test_an_unknown_dataset(model: Path) -> None:
    message, hint = fail("calibrate", "--model", model, "--dataset", "wikitext")
    assert "'wikitext'" in message
    assert hint == "Did you mean 'wikitext2'?"
    assert "absent.txt" in fail("calibrate", "--model", model, "--dataset", "absent.txt")[0]


def test_the_calibration_text_is_no_evaluation_text(
    quick: tuple[object, ...], tmp_path: Path
) -> None:
    made, text = tmp_path / "made", quick[3]
    evaluating = ("--evaluate", "--set", f"eval.dataset={text}")
    message, _ = fail("compress", *quick, "--output", made, *evaluating)
    assert "was calibrated on" in message
    assert not made.exists()
    succeed("compress", *quick, "--output", made)
    message, _ = fail("eval", made, "--dataset", text, "--seqlen", 32)
    assert "was calibrated on" in message


def test_an_output_that_is_in_the_way(quick: tuple[object, ...], here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("keep")
    (here / "taken.pt").write_text("keep")
    (here / "beside.plan.json").write_text("keep")
    (here / "file").write_text("keep")
    before = digests(here)
    for words, told in (
        (("file/below/it",), "Cannot write into"),
        (("mine",), "mine is not empty"),
        (("mine", "--overwrite"), "hisvd did not write"),
        (("taken.pt",), "taken.pt exists"),
        (("beside.pt",), "beside.plan.json exists"),
        (("file",), "file is a file"),
    ):
        result = hisvd("compress", *quick, "--output", *words)
        assert "Calibrating" not in result.stderr
        assert told in two_lines(result.stderr)[0]
    message, _ = fail("plan", *quick, "--output", "beside.plan.json")
    assert "beside.plan.json exists and is not a plan" in message
    assert digests(here) == before


def test_overwrite_replaces_what_hisvd_wrote(quick: tuple[object, ...], here: Path) -> None:
    succeed("compress", *quick, "--ratio", 0.5, "--output", "made")
    message, hint = fail("compress", *quick, "--ratio", 0.6, "--output", "made")
    assert "made is not empty" in message
    assert "--overwrite" in hint
    assert json.loads((here / "made" / "hisvd.json").read_text())["ratio"] == 0.5
    succeed("compress", *quick, "--ratio", 0.6, "--output", "made", "--overwrite")
    assert json.loads((here / "made" / "hisvd.json").read_text())["ratio"] == 0.6
    assert {path.name for path in here.iterdir()} == {"made"}


def test_a_plan_for_another_model(
    quick: tuple[object, ...], tiny_model: MakeModel, here: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    succeed("plan", *quick, "--output", plan)
    other = ("--model", tiny_model("llama_untied"), *quick[2:])
    result = hisvd("compress", *other, "--plan", plan)
    assert "Calibrating" not in result.stderr
    assert "was made for" in two_lines(result.stderr)[0]
    message, _ = fail("compress", *quick, "--plan", plan, "--ratio", 0.5, code=2)
    assert message == "--ratio cannot change the given plan."
    plan.write_text("{}")
    message, _ = fail("compress", *quick, "--plan", plan)
    assert "is not a plan" in message
    assert nothing_made(here)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def scramble(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def no_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def lose(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def widen(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=64)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "model.safetensors"),
        (scramble, "model.safetensors"),
        (no_number, "up_proj.weight in model.safetensors contains 1 values that are NaN"),
        (lose, "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (widen, "but the config requires"),
        (no_tokenizer, "cannot be loaded"),
        (no_config, "no config.json"),
        (broken_config, "not valid JSON"),
    ],
)
def test_a_damaged_model(
    damage: Callable[[Path], None],
    told: str,
    model: Path,
    quick: tuple[object, ...],
    here: Path,
) -> None:
    damage(model)
    message, _ = fail("compress", *quick, "--ratio", 0.6)
    assert told in message
    assert nothing_made(here)


def test_a_lost_shard(quick: tuple[object, ...], here: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    succeed("compress", *quick, "--output", made, "--max-shard-size", 0.00002)
    shards = sorted(made.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].rename(shards[1].with_suffix(".away"))
    for words in (("eval", made, "--dataset", text_file(tmp_path, seed=2)), ("inspect", made)):
        message, _ = fail(*words)
        assert f"lacks 1 of {len(shards)} shards" in message
    assert nothing_made(here)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').write('pwned')",)


def test_a_pickle_with_code_is_never_run(here: Path, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    crafted = tmp_path / "crafted.pt"
    torch.save({"format": "hisvd-pt", "format_version": 1, "x": Payload(target)}, crafted)
    result = hisvd("inspect", crafted)
    assert result.exit_code == 1
    assert "builtins.exec" in result.stdout
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Payload(target)))
    fail("inspect", plain)
    for words in (
        ("eval", crafted),
        ("eval", plain),
        ("convert", crafted, "--to", "hf", "--output", "out"),
        ("convert", crafted, "--to", "dense", "--output", "out"),
        ("calibrate", "--model", crafted),
    ):
        fail(*words)
    assert not target.exists()
    assert nothing_made(here)


def test_pickled_weights_with_code_are_never_run(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(target)}, model / "pytorch_model.bin")
    for words in (("plan", "--model", model), ("eval", model), ("inspect", model)):
        fail(*words)
    assert not target.exists()


def test_convert_refuses_what_it_cannot_write(quick: tuple[object, ...], here: Path) -> None:
    succeed("compress", *quick, "--output", "made")
    before = digests(here)
    fail("convert", "made", "--to", "pt", "--output", "folder", code=2)
    fail("convert", "made", "--to", "hf", "--output", "file.pt", code=2)
    fail("convert", "made", "--to", "hf", "--output", "made")
    fail("convert", "absent", "--to", "hf", "--output", "other")
    fail("convert", "made/config.json", "--to", "hf", "--output", "new/other")
    assert digests(here) == before
    assert {path.name for path in here.iterdir()} == {"made"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [50_000, 2_000_000],
    ids=["calibration", "checkpoint"],
)
def test_a_full_disk(limit: int, here: Path) -> None:
    """A limit on the size of files gives the error of a full disk for real."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ("compress", *QUICK, "--ratio", 0.6, "--no-evaluate")
    done = script(*words, cwd=here, before=small_files)
    assert done.returncode == 1, done.stderr
    message, hint = two_lines(done.stderr)
    assert message.startswith("Cannot write ")
    assert "space" in hint
    assert not any(path.name[0] != "." for path in here.iterdir())
    succeed(*words)
    assert {path.name for path in here.iterdir()} == {"demo-0.6"}
