"""Presets, methods and their statistics on the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from hisvd_cli.pipelines.config.presets import PRESETS
from tests.cli_helpers import (
    QUICK,
    as_json,
    digests,
    fail,
    running,
    script,
    stop_at,
    succeed,
    text_file,
)
from tests.conftest import MakeModel

pytestmark = pytest.mark.usefixtures("here")
BLIND = ("--no-evaluate",)
FOLDER = ("--calibration", "calibration")


def test_best_takes_what_it_needs_and_keeps_it(here: Path) -> None:
    made = as_json("compress", *QUICK, *FOLDER, "--preset", "best", "--ratio", 0.6, *BLIND)
    assert as_json("inspect", made["output"])["problems"] == []
    record = json.loads((Path(made["output"]) / "hisvd.json").read_text(encoding="utf-8"))
    assert (record["allocator"], record["decomposer"]) == ("waterfill", "fisher")
    assert record["gradients"]["weights"] is False
    assert not (here / "calibration" / "inputs").exists()
    before = digests(here / "calibration")
    again = as_json("compress", *QUICK, *FOLDER, "--preset", "best", "--ratio", 0.8, *BLIND)
    assert again["seconds"]["calibrate"] < 1
    assert before == digests(here / "calibration")


def test_gradients_are_added_to_a_calibration_as_if_taken_at_once(here: Path) -> None:
    succeed("calibrate", *QUICK, *FOLDER)
    plain = digests(here / "calibration")
    succeed("calibrate", *QUICK, *FOLDER, "--gradients")
    later = digests(here / "calibration")
    assert plain.items() <= later.items()
    succeed("calibrate", *QUICK, "--calibration", "at-once", "--gradients")
    assert digests(here / "at-once") == later


def test_weight_gradients_imply_gradients() -> None:
    made = as_json("calibrate", *QUICK, *FOLDER, "--weight-gradients")
    assert made["gradients"]["weights"] is True
    plan = as_json("plan", *QUICK, *FOLDER, "--preset", "zs-svd", "--ratio", 0.6)
    assert plan["allocator"] == "zero-sum"
    assert as_json("plan", *QUICK, *FOLDER, "--metric", "fisher", "--ratio", 0.6)


@pytest.mark.parametrize(
    ("words", "method", "command"),
    [
        (("--preset", "best"), "held-out", "hisvd calibrate --gradients"),
        (("--allocator", "zero-sum"), "zero-sum", "hisvd calibrate --weight-gradients"),
        (("--preset", "lems"), "fisher", "hisvd calibrate --gradients"),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_plan_without_its_statistics_names_the_command(
    words: tuple[str, ...], method: str, command: str, calibrated: bool
) -> None:
    if calibrated:
        succeed("calibrate", *QUICK, *FOLDER)
    folder = FOLDER if calibrated else ()
    wrong, hint = fail("plan", *QUICK, *folder, *words)
    assert f"'{method}' needs" in wrong
    shown = hint.removeprefix("Run: ").split()
    assert [shown[1], shown[-1]] == command.split()[1:]
    assert shown[2:-1] == [str(word) for word in (*QUICK, *folder)]


def test_a_text_that_changed_gives_no_gradients(tiny_model: MakeModel, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    quick = ("--model", tiny_model("llama"), "--samples", 4, "--seqlen", 32, *FOLDER)
    succeed("calibrate", *quick, "--dataset", text)
    text.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    wrong, hint = fail("compress", *quick, "--preset", "best")
    assert "differs from the one" in wrong
    assert "calibrate again" in hint


def test_plans_of_several_allocators_stand_side_by_side(here: Path) -> None:
    succeed("calibrate", *QUICK, *FOLDER)
    both = ("--allocator", "hisvd", "--allocator", "waterfill", "--allocator", "uniform")
    done = succeed("plan", *QUICK, *FOLDER, *both, "--ratio", 0.8, "--ratio", 0.6)
    assert done.stdout.count("whole model") == 2
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "full" not in done.stdout
    assert "full" in succeed("plan", *QUICK, *FOLDER, *both, "--tables").stdout
    plans = as_json("plan", *QUICK, *FOLDER, *both, "--ratio", 0.6)["plans"]
    assert [plan["allocator"] for plan in plans] == ["hisvd", "waterfill", "uniform"]
    assert min(plans, key=lambda plan: plan["predicted_loss"]) == plans[1]
    wrong, _ = fail("plan", *QUICK, *FOLDER, *both, "--output", here / "plan.json", code=2)
    assert "3 allocators" in wrong


@pytest.mark.slow
def test_a_plan_is_carried_out_in_the_metric_that_it_counted_with(here: Path) -> None:
    succeed("calibrate", *QUICK, *FOLDER, "--gradients")
    best = ("--preset", "best", "--ratio", 0.6, "--set", "plan.output_shrinkage=0.5")
    succeed("plan", *QUICK, *FOLDER, *best, "--output", "plan.json")
    planned = ("--plan", "plan.json", "--decomposer", "fisher", "--output", "planned")
    succeed("compress", *QUICK, *FOLDER, *planned, *BLIND)
    succeed("compress", *QUICK, *FOLDER, *best, *BLIND, "--output", "direct")
    weights = "model.safetensors"
    assert (here / "planned" / weights).read_bytes() == (here / "direct" / weights).read_bytes()


@pytest.mark.slow
def test_text_of_the_model_itself(here: Path) -> None:
    made = as_json("calibrate", *QUICK, "--dataset", "self", *FOLDER)
    assert made["data"]["dataset"] == "self"
    assert made["data"]["tokens"] == 8 * 64
    own = ("--dataset", "self", *FOLDER, "--preset", "best", "--ratio", 0.8)
    succeed("compress", *QUICK, *own, *BLIND)
    assert (here / "calibration" / "gradients").is_dir()


@pytest.mark.parametrize("allocator", ["asvd", "lems", "learned"])
def test_a_dry_run_states_what_measuring_costs(allocator: str, here: Path) -> None:
    done = as_json("plan", *QUICK, "--allocator", allocator, "--dry-run")
    assert done["seconds"] == done["allocators"][allocator] > 0
    free = as_json("plan", *QUICK, "--allocator", "waterfill", "--dry-run")
    assert free["seconds"] == 0
    dearer = as_json("compress", *QUICK, "--allocator", allocator, "--dry-run")
    assert dearer["stages"]["plan"] > 0
    assert not any(here.iterdir())


def test_a_dry_run_counts_gradients() -> None:
    plain = as_json("calibrate", *QUICK, "--dry-run")
    more = as_json("calibrate", *QUICK, "--gradients", "--dry-run")
    most = as_json("calibrate", *QUICK, "--weight-gradients", "--dry-run")
    assert plain["bytes"] < more["bytes"] < most["bytes"]


def test_few_tokens_get_a_warning(here: Path) -> None:
    done = succeed("calibrate", *QUICK, *FOLDER)
    assert "512 tokens are few for a model of hidden size" in done.stderr
    assert (here / "calibration").is_dir()


def test_gradients_are_mentioned_where_nothing_uses_them() -> None:
    succeed("calibrate", *QUICK, *FOLDER, "--gradients")
    assert "--preset best" in succeed("plan", *QUICK, *FOLDER).stderr
    assert "--preset best" not in succeed("plan", *QUICK, *FOLDER, "--allocator", "uniform").stderr


def test_presets_are_listed_in_help() -> None:
    shown = succeed("compress", "--help-all", env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in PRESETS)


@pytest.mark.slow
def test_a_killed_reverse_walk_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    larger = ("--model", "demo", "--samples", 16, "--seqlen", 256, "--gradients")
    done = script("calibrate", *larger, "--calibration", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for at in (1, 4):
        with running("calibrate", *larger, *FOLDER, cwd=tmp_path) as process:
            # Not there before the calibration itself is.
            partial = tmp_path / "calibration" / ".gradients.partial"
            stop_at(process, "block-*.safetensors", partial, at, signal.SIGKILL)
        assert not (tmp_path / "calibration" / "gradients").exists()
        times = {p.name: p.stat().st_mtime_ns for p in partial.glob("block-*.safetensors")}
        assert at <= len(times) < 6
    done = script("calibrate", *larger, *FOLDER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "calibration" / "gradients"
    for name, time in times.items():
        assert (made / name).stat().st_mtime_ns == time, "measured again"
    assert digests(tmp_path / "calibration") == digests(tmp_path / "whole")
