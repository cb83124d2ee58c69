"""``hisvd compress`` of several presets and ratios: each as if made alone, what is there kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hisvd_cli.pipelines.compressing import compression
from hisvd_cli.pipelines.compressing.grid import grid_runs
from hisvd_cli.utils.errors import NumericalError
from tests import schemas
from tests.cli_helpers import as_json, digests, fail, hisvd, succeed, text_file
from tests.conftest import CACHE, MakeModel
from tests.models import names

GRID = ("--preset", "hisvd", "--preset", "svd-llm", "--ratio", 0.8, "--ratio", 0.5)
CELLS = [f"llama-{preset}-{ratio}" for preset in ("hisvd", "svd-llm") for ratio in (0.8, 0.5)]


@pytest.fixture
def command(tiny_model: MakeModel, tmp_path: Path) -> tuple[object, ...]:
    """A compression of a tiny model by a little text."""
    text = ("--dataset", text_file(tmp_path), "--samples", 8, "--seqlen", 32)
    return ("compress", "--model", tiny_model("llama"), *text)


def grid(*words: object) -> Any:
    document = as_json(*words)
    jsonschema.Draft202012Validator(schemas.CELLS).validate(document)
    return document["cells"]


def statuses(cells: Any) -> list[str]:
    return [cell["status"] for cell in cells]


def test_cells_are_what_single_runs_make(
    command: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = grid(*command, *GRID)
    assert [cell["output"] for cell in cells] == CELLS
    assert statuses(cells) == ["made"] * 4
    assert len(list((here.parent / CACHE / "calibration").glob("*/*/calibration.json"))) == 1
    alone = as_json(*command, "--preset", "svd-llm", "--ratio", 0.5, "--output", "alone")
    assert digests(here / "alone") == digests(here / CELLS[3])
    same = ("ratio", "model_ratio", "kept_parameters", "bytes")
    assert [cells[3][key] for key in same] == [alone[key] for key in same]

    before = digests(here)
    monkeypatch.setattr(grid_runs, "ensure_calibration", None)  # nothing needs it
    assert statuses(grid(*command, *GRID)) == ["kept"] * 4
    assert digests(here) == before
    shown = succeed(*command, *GRID, env={"COLUMNS": "80"})
    assert shown.stdout.count("kept") == 4
    assert f"hisvd eval {' '.join(CELLS)} --baseline" in shown.stderr


def test_ratios_of_a_profile_are_a_grid(command: tuple[object, ...], here: Path) -> None:
    (here / "hisvd.toml").write_text("[plan]\nratio = [0.8, 0.6, 0.5]\n", encoding="utf-8")
    forecast = as_json(*command, "--dry-run", "--output", "made")
    assert [cell["ratio"] for cell in forecast["cells"]] == [0.8, 0.6, 0.5]
    each = [sum(c["stages"].values()) for c in forecast["cells"]]
    assert max(each) <= forecast["seconds"] < sum(each)
    assert "in total" in succeed(*command, "--dry-run").stdout
    assert names(here) == ["hisvd.toml"]
    cells = grid(*command, "--output", "made")
    assert names(here / "made") == ["llama-0.5", "llama-0.6", "llama-0.8"]
    assert {cell["preset"] for cell in cells} == {None}


def test_a_failure_leaves_the_others_and_a_rerun_goes_on(
    command: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = compression.compress_model

    def failing(resolved: Any, output: Path, *more: Any) -> Any:
        if output.name == CELLS[1]:
            raise NumericalError("It is not finite.", "Calibrate again.")
        return real(resolved, output, *more)

    monkeypatch.setattr(grid_runs, "compress_model", failing)
    result = hisvd(*command, *GRID, "--quiet")
    assert result.exit_code == 1
    assert result.stdout.split() == [CELLS[0], *CELLS[2:]]
    assert result.stderr.splitlines()[-2:] == [
        f"Error: {CELLS[1]}: It is not finite.",
        "Hint: Calibrate again.",
    ]
    assert names(here) == sorted([CELLS[0], *CELLS[2:]])
    monkeypatch.setattr(grid_runs, "compress_model", real)
    assert statuses(grid(*command, *GRID)) == ["kept", "made", "kept", "kept"]


def test_a_checkpoint_of_other_settings_stands_in_the_way(
    command: tuple[object, ...], tiny_model: MakeModel, here: Path
) -> None:
    succeed(*command, "--preset", "svd-llm", "--ratio", 0.5, "--multiple-of", 4, "-o", CELLS[3])
    before = digests(here)
    message, hint = fail(*command, *GRID)
    assert message == f"{CELLS[3]} was made with other settings: plan.multiple_of."
    assert hint == "Pass --overwrite, or name another --output."
    assert digests(here) == before  # found out before any work
    assert statuses(grid(*command, *GRID, "--overwrite")) == ["made"] * 4
    assert statuses(grid(*command, *GRID)) == ["kept"] * 4
    (here / CELLS[0]).rename(here / "qwen2-hisvd-0.8")
    (here / CELLS[1]).rename(here / "qwen2-hisvd-0.5")
    other = ("compress", "--model", tiny_model("qwen2"), *command[3:], *GRID[:2], *GRID[4:])
    assert "with other settings: model." in fail(*other)[0]


def test_all_cells_are_of_one_calibration(
    command: tuple[object, ...], tmp_path: Path, here: Path
) -> None:
    """The same settings, but another text stands in the file."""
    succeed(*command, *GRID[:2], "--ratio", 0.8, "--output", CELLS[0])
    text = text_file(tmp_path)
    text_file(tmp_path, seed=1).rename(text)
    assert f"with other settings: the text of {text}." in fail(*command, *GRID)[0]
    assert names(here) == [CELLS[0]]


def test_a_grid_of_wrong_things_starts_nothing(command: tuple[object, ...], here: Path) -> None:
    (here / "file").touch()
    assert "file is a file" in fail(*command, *GRID, "--output", "file")[0]
    assert "bset" in fail(*command, "--preset", "hisvd", "--preset", "bset", code=2)[0]
    succeed("plan", *command[1:], "--output", "p.json")
    (here / "hisvd.toml").write_text('[plan]\npreset = ["best", "hisvd"]\n', encoding="utf-8")
    message, _ = fail(*command, "--plan", "p.json", code=2)
    assert message == "Several presets are set, but --plan names one plan."
    assert names(here) == ["file", "hisvd.toml", "p.json"]
