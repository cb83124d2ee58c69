"""The command line as a person uses it."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from hisvd_cli import __version__
from hisvd_cli.pipelines import named_source
from tests.cli_helpers import (
    QUICK,
    SCRIPT,
    as_json,
    digests,
    environment,
    fail,
    hisvd,
    running,
    script,
    stop_at,
    succeed,
    text_file,
    two_lines,
)
from tests.conftest import MakeModel
from tests.models import CONFIGS, save_model

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def quick(tiny_model: MakeModel, tmp_path: Path) -> tuple[object, ...]:
    """Flags of a calibration that takes a moment."""
    text = text_file(tmp_path)
    return ("--model", tiny_model("llama"), "--dataset", text, "--samples", 4, "--seqlen", 32)


def next_command(stderr: str) -> list[str]:
    """Return the words of the command that a run suggests."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("Next: ")]
    program, *words = shlex.split(line.removeprefix("Next: "))
    assert program == "hisvd"
    return words


def test_without_a_word_it_helps() -> None:
    assert succeed().stdout == succeed("--help").stdout == succeed("-h").stdout
    for command in ("calibrate", "plan", "compress", "inspect", "eval", "convert"):
        assert command in succeed().stdout


def test_version() -> None:
    assert succeed("--version").stdout == f"hisvd {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "hisvd_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"hisvd {__version__}\n"


def test_each_command_names_the_next_one_and_that_one_works(
    quick: tuple[object, ...], tmp_path: Path
) -> None:
    words = next_command(succeed("calibrate", *quick).stderr)
    assert words[0] == "plan"
    planned = succeed(*words)
    assert "Warning" not in planned.stderr  # it found the calibration
    words = next_command(planned.stderr)
    assert words[0] == "compress"
    compressed = succeed(*words, "--output", "my checkpoint")
    assert "Calibrating" not in compressed.stderr
    words = next_command(compressed.stderr)
    assert words[:2] == ["eval", "my checkpoint"]
    other = text_file(tmp_path, 300, seed=3)
    succeed(*words, "--dataset", other, "--seqlen", 32)
    converted = succeed("convert", "my checkpoint", "--to", "dense", "--output", "a dense one")
    words = next_command(converted.stderr)
    assert words == ["eval", "a dense one"]
    succeed(*words, "--dataset", other, "--seqlen", 32)
    packed = succeed("convert", "my checkpoint", "--to", "pt", "--output", "one.pt")
    assert next_command(packed.stderr) == ["inspect", "one.pt"]
    succeed("inspect", "one.pt")


def test_a_plan_with_several_ratios_names_a_command_with_one(quick: tuple[object, ...]) -> None:
    result = succeed("plan", *quick, "--ratio", 0.7, "--ratio", 0.5, "--alpha", 1)
    words = next_command(result.stderr)
    assert [words[i + 1] for i, word in enumerate(words) if word == "--ratio"] == ["0.7"]
    assert words[-2:] == ["--alpha", "1.0"]
    assert "Share kept of each layer at keep 0.7" in result.stdout
    assert "Share kept of each layer at keep 0.5" in result.stdout


def test_a_plan_file_is_what_compress_carries_out(quick: tuple[object, ...], here: Path) -> None:
    succeed("calibrate", *quick)
    result = succeed("plan", *quick, "--ratio", 0.5, "--output", "plan.json")
    words = next_command(result.stderr)
    assert words[-2:] == ["--plan", "plan.json"]
    succeed(*words, "--output", "from-plan")
    succeed("compress", *quick, "--ratio", 0.5, "--output", "at-once")
    weights = [(here / name / "model.safetensors") for name in ("from-plan", "at-once")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    succeed("plan", *quick, "--ratio", 0.4, "--output", "plan.json")  # a plan may be replaced
    assert json.loads((here / "plan.json").read_text())["ratio"] == 0.4


def test_the_output_is_named_after_model_and_ratio(quick: tuple[object, ...], here: Path) -> None:
    result = succeed("compress", *quick, "--ratio", 0.6, "-q")
    assert result.stdout == "llama-0.6\n"
    assert "Next: " not in result.stderr
    assert {path.name for path in here.iterdir()} == {"llama-0.6"}


def test_quiet_results(quick: tuple[object, ...], tmp_path: Path) -> None:
    calibrated = succeed("calibrate", *quick, "-q")
    assert Path(calibrated.stdout.strip(), "calibration.json").is_file()
    (warning,) = calibrated.stderr.splitlines()
    assert warning.startswith("Warning: 128 tokens are few")
    planned = succeed("plan", *quick, "--ratio", 0.8, "--ratio", 0.5, "-q").stdout.split()
    assert 0 < float(planned[1]) < float(planned[0]) < 1
    succeed("compress", *quick, "--output", "made", "-q")
    words = ("made", "--dataset", text_file(tmp_path, 300, seed=3), "--seqlen", 32)
    assert float(succeed("eval", *words, "-q").stdout) > 1
    assert succeed("convert", "made", "--to", "pt", "-o", "a.pt", "-q").stdout == "a.pt\n"


def test_a_plan_says_when_it_knows_no_calibration(quick: tuple[object, ...]) -> None:
    result = succeed("plan", *quick)
    assert (
        "has no calibration with these settings: planning from its weights alone" in result.stderr
    )
    assert "energy of the weights" in result.stdout
    succeed("calibrate", *quick)
    result = succeed("plan", *quick)
    assert "Warning" not in result.stderr
    assert "mean squared output error" in result.stdout
    result = succeed("plan", "--model", quick[1])  # nothing in particular asked for
    assert "using the newest calibration of" in result.stderr


def test_a_text_with_fewer_windows_than_asked_for(quick: tuple[object, ...]) -> None:
    result = succeed("calibrate", *quick, "--samples", 100_000)
    assert "using all of them instead of 100000" in result.stderr


def test_what_is_dropped_from_the_text_is_as_if_it_were_not_there(
    quick: tuple[object, ...], here: Path
) -> None:
    plain = Path(str(quick[quick.index("--dataset") + 1])).read_text(encoding="utf-8")
    (here / "rare.txt").write_text(plain.replace(" ", " <unk> "), encoding="utf-8")
    flags = ("--dataset", "rare.txt", "--drop", "<unk>", "--calibration", "rare")
    succeed("calibrate", *quick, "--calibration", "plain")
    succeed("calibrate", *quick, *flags)
    made = [
        json.loads((here / name / "calibration.json").read_text()) for name in ("plain", "rare")
    ]
    assert made[0]["data"]["tokens_sha256"] == made[1]["data"]["tokens_sha256"]
    assert [each["data"]["drop"] for each in made] == ["", "<unk>"]
    # What draws the text again leaves it out too.
    succeed("compress", *quick, *flags, "--update", "closed-form", "--output", "made")
    message, hint = fail("plan", *quick, *flags[:3], "of", *flags[4:])
    assert message.endswith("was calibrated with --drop <unk>, not of.")
    assert "Leave out --drop" in hint
    message, hint = fail("calibrate", *quick, "--dataset", "self", "--drop", "<unk>", code=2)
    assert message.startswith("--drop '<unk>' removes a string from a text that is read, but ")


def test_spectra_of_weights_are_found_for_those_who_look_at_them(
    quick: tuple[object, ...], tmp_path: Path
) -> None:
    def found() -> list[Path]:
        return list((tmp_path / "hisvd-cache" / "weights").rglob("spectra.safetensors"))

    succeed("calibrate", *quick)
    succeed("plan", *quick, "--allocator", "uniform")
    assert not found()
    succeed("plan", *quick, "--allocator", "uniform", "--allocator", "hisvd")
    assert len(found()) == 1


def test_a_dry_run_does_nothing(quick: tuple[object, ...], here: Path, tmp_path: Path) -> None:
    calibrating = as_json("calibrate", *quick, "--dry-run")
    assert calibrating["tokens"] == 128
    compressing = as_json("compress", *quick, "--ratio", 0.5, "--dry-run")
    assert "Dry run: nothing was done." in succeed("compress", *quick, "--dry-run").stdout
    assert not any(here.iterdir())
    assert not (tmp_path / "hisvd-cache" / "calibration").exists()
    # What it foretold comes true, at least in size.
    made = as_json("compress", *quick, "--ratio", 0.5)
    assert compressing["output"] == made["output"]
    assert compressing["bytes"] == pytest.approx(made["bytes"], rel=0.1)
    folder = Path(as_json("calibrate", *quick)["output"])
    written = sum(path.stat().st_size for path in folder.glob("block-*"))
    assert calibrating["bytes"] == pytest.approx(written, rel=0.5)
    fail("compress", *quick, "--ratio", 0.5, "--dry-run")  # the output stands there now


def test_a_dry_run_of_a_plan_knows_its_size_exactly(quick: tuple[object, ...]) -> None:
    succeed("plan", *quick, "--ratio", 0.5, "--output", "plan.json")
    words = ("compress", *quick, "--plan", "plan.json")
    foretold = as_json(*words, "--dry-run")["bytes"]
    succeed(*words, "--output", "made")
    shown = as_json("inspect", "made")
    tensors = 4 * shown["parameters"]  # the model is stored in float32
    assert foretold == tensors


def test_settings_travel_from_profile_and_environment(
    quick: tuple[object, ...], here: Path
) -> None:
    (here / "hisvd.toml").write_text("[plan]\nratio = 0.9\nalpha = 0.1\nmultiple_of = 2\n")
    environ = {"HISVD_PLAN_ALPHA": "0.2", "HISVD_PLAN_MULTIPLE_OF": "4"}
    words = ("plan", *quick, "--multiple-of", 8, "--json")
    plan = json.loads(succeed(*words, env=environ).stdout)
    assert plan["ratio"] == 0.9
    assert plan["settings"]["alpha"] == 0.2
    assert plan["settings"]["multiple_of"] == 8
    assert all(row["dense"] or row["rank"] % 8 == 0 for row in plan["sublayers"])


def test_tables_of_32_layers_fit_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sizes = CONFIGS["llama"]
    monkeypatch.setitem(CONFIGS, "deep", (name, {**sizes, "num_hidden_layers": 32}))
    folder = save_model("deep", tmp_path / "deep")
    shown = succeed("plan", "--model", folder, "--ratio", 0.6, env={"COLUMNS": "80"}).stdout
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["B"])
    assert lines[header].split() == 2 * ["B", "q", "k", "v", "o", "gate", "up", "down"]
    rows = [line.split()[0] for line in lines[header + 1 : header + 17]]
    assert [int(row) for row in rows] == list(range(16))
    kept = [line for line in lines if line.startswith(" q_proj")]
    assert kept[0].split()[1] == "32"


def test_a_narrow_terminal_gets_several_tables(quick: tuple[object, ...]) -> None:
    shown = succeed("plan", *quick, "--verbose", env={"COLUMNS": "30"}).stdout
    lines = [line.rstrip() for line in shown.splitlines()]
    assert sum(line.split()[:1] == ["B"] for line in lines) > 1
    assert sum(line.split()[:1] == ["block"] for line in lines) > 1


def test_spectra_are_drawn_and_given_as_numbers(quick: tuple[object, ...]) -> None:
    words = (
        "plan",
        *quick,
        "--ratio",
        0.5,
        "--spectrum-of",
        "0.*.q_proj",
        "--spectrum-of",
        "v_proj",
    )
    lines = succeed(*words, env={"COLUMNS": "80"}).stdout.splitlines()
    drawn = [i for i, line in enumerate(lines) if "of the energy kept" in line]
    assert len(drawn) == 1 + 3
    assert "│" in lines[drawn[0] + 1]
    document = as_json(*words)
    plan = {row["name"]: row for row in document["sublayers"]}
    for spectrum in document["spectra"]:
        row = plan[spectrum["name"]]
        assert len(spectrum["energy"]) == row["full_rank"]
        assert sum(spectrum["energy"][row["rank"] :]) == pytest.approx(row["loss"])
    message, _ = fail("plan", *quick, "--spectrum-of", "nothing", code=2)
    assert message == "The pattern 'nothing' does not match any layer."


def test_a_pipe_gets_one_line_per_row(quick: tuple[object, ...], tmp_path: Path) -> None:
    long = tmp_path / ("a folder with quite a long name " * 5)
    shown = succeed("calibrate", *quick, "--calibration", long).stdout
    assert str(long) in shown


def test_the_installed_script(here: Path) -> None:
    done = script("compress", *QUICK, "--ratio", 0.6, "--windows", 4, cwd=here)
    assert done.returncode == 0, done.stderr
    for line in ("size", "kept", "time", "peak memory", "perplexity"):
        assert line in done.stdout
    assert "Loading weights" not in done.stderr  # transformers' own progress bar
    assert "it/s" not in done.stderr
    assert done.stderr.splitlines()[-1] == "Next: hisvd inspect demo-0.6"
    assert digests(here / "demo-0.6").keys() >= {"config.json", "model.safetensors", "plan.json"}
    assert succeed("inspect", "demo-0.6", "-q").stdout == "checkpoint: no problems\n"
    # A second run needs no calibration, and refuses to write over the first.
    message, _ = two_lines(script("compress", *QUICK, "--ratio", 0.6, cwd=here).stderr)
    assert "demo-0.6 is not empty" in message


def test_ratio_costs_perplexity() -> None:
    """The demo model shows the trade: less of it, worse text."""
    succeed("calibrate", *QUICK)
    found = []
    for ratio in (0.8, 0.4):
        document = as_json("compress", *QUICK, "--ratio", ratio, "--windows", 4)
        found.append(document["perplexity"])
    assert found[0]["before"] == found[1]["before"] < found[0]["after"] < found[1]["after"]
    assert found[1]["after"] > 1.05 * found[0]["after"]


def test_one_file_in_and_out(quick: tuple[object, ...], here: Path, tmp_path: Path) -> None:
    made = as_json("compress", *quick, "--output", "one.pt")
    assert {path.name for path in here.iterdir()} == {"one.pt", "one.plan.json"}
    assert made["plan"] == "one.plan.json"
    assert set(torch.load("one.pt", weights_only=True)) >= {"tensors", "config", "provenance"}
    words = ("--dataset", text_file(tmp_path, 300, seed=3), "--seqlen", 32)
    one = as_json("eval", "one.pt", *words)["results"]
    succeed("convert", "one.pt", "--to", "hf", "--output", "folder")
    assert as_json("eval", "folder", *words)["results"] == one
    succeed("convert", "one.pt", "--to", "dense", "--output", "dense")
    dense = as_json("eval", "dense", *words)["results"]
    assert dense[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-3)
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    fail("compress", *quick, "--output", "one.pt")
    succeed("compress", *quick, "--output", "one.pt", "--overwrite")


def test_baseline_and_model_are_measured_alike(quick: tuple[object, ...], tmp_path: Path) -> None:
    """The baseline has fewer positions: both get windows that it can read."""
    short = tmp_path / "short"
    shutil.copytree(str(quick[1]), short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    text = text_file(tmp_path, 600, seed=3)
    document = as_json("eval", quick[1], "--dataset", text, "--baseline", short)
    ours, theirs = document["results"][0], document["baseline"]["results"][0]
    assert ours["seqlen"] == theirs["seqlen"] == 64
    assert ours["windows"] == theirs["windows"]
    shown = succeed("eval", quick[1], "--dataset", text, "--baseline", short).stdout
    assert "1.00 ×" in shown


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(here: Path) -> None:
    words = ("calibrate", "--model", "demo", "--samples", 96, "--seqlen", 256)
    with running(*words, "--calibration", "made", cwd=here) as process:
        stderr = stop_at(process, "block-*", here / ".made.partial", 2, signal.SIGINT)
    assert process.returncode == 130
    message, hint = two_lines(stderr)
    assert message == "Interrupted."
    assert "last completed block" in hint
    assert not (here / "made").exists()
    assert len(list((here / ".made.partial").glob("block-*"))) >= 2


def test_an_interrupt_that_native_code_swallows(monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*_: object) -> NoReturn:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
        raise AssertionError("nothing was raised")

    monkeypatch.setattr(named_source, "named_source", swallow)
    # A test run in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert fail("calibrate", *QUICK, code=130)[0] == "Interrupted."
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "--json"])
def test_nobody_reads_the_end(mode: str, quick: tuple[object, ...]) -> None:
    succeed("plan", *quick, "--output", "plan.json")
    line = f"set -o pipefail; {shlex.quote(SCRIPT)} inspect {mode} plan.json | true"
    done = subprocess.run(
        ["bash", "-c", line], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def boom(error: BaseException) -> object:
    def build_nothing(*_: object) -> NoReturn:
        raise error

    return build_nothing


def real_memory_error() -> RuntimeError:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("there is no such memory")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
        real_memory_error(),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_out_of_memory_names_the_levers(
    error: Exception, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrapped:
        outer = ValueError("cannot load")
        outer.__cause__ = error
        error = outer
    monkeypatch.setattr(named_source, "named_source", boom(error))
    message, hint = fail("calibrate", *QUICK)
    assert message.startswith("Out of memory")
    for lever in ("--batch", "--seqlen", "--samples", "--dtype", "--device"):
        assert lever in hint


def test_out_of_memory_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    monkeypatch.setattr(named_source, "named_source", boom(error))
    assert fail("calibrate", *QUICK)[0] == "Out of memory: cannot allocate 20.00 GiB."


def test_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_source, "named_source", boom(LookupError("first\nsecond")))
    result = hisvd("calibrate", *QUICK)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Internal error (LookupError): first.\n"
        "Hint: Please report this with the traceback, which HISVD_DEBUG=1 shows.\n"
    )
    result = hisvd("calibrate", *QUICK, env={"HISVD_DEBUG": "1"})
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "Error: Internal error (LookupError): first." in result.stderr


def test_debugging_keeps_exit_codes() -> None:
    result = hisvd("plan", env={"HISVD_DEBUG": "1"})
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = PermissionError(13, "Permission denied", str(tmp_path / "x"))
    monkeypatch.setattr(named_source, "named_source", boom(error))
    message, hint = fail("calibrate", *QUICK)
    assert message == f"Cannot use {tmp_path / 'x'}: Permission denied."
    assert "permissions" in hint


def test_the_demo_is_calibrated_on_fewer_windows_by_default(here: Path) -> None:
    def tokens(*words: object) -> int:
        forecast = as_json("calibrate", "--model", "demo", "--dry-run", *words)
        return int(forecast["tokens"])

    assert tokens() == 64 * 512
    assert tokens("--dataset", text_file(here)) == 256 * 512
    assert tokens("--samples", 3) == 3 * 512
