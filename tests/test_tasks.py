"""``hisvd eval --tasks``: lm-eval asks, and its own command line finds the same on our folders."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from hisvd_cli.pipelines.evaluating import tasks as builder
from tests import schemas
from tests.cli_helpers import QUICK, as_json, environment, fail, hisvd, succeed
from tests.test_eval_grid import holds

_ENDS = ("ran away", "was a big", "and it too")
_QUESTIONS = [
    {"question": f"Once there was a {name} that", "choices": [*_ENDS], "label": i % 3}
    for i, name in enumerate(("cat", "dog", "bird", "girl", "boy", "tree"))
]
_YAML = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_TEXT = ("--windows", 2, "--seqlen", 32)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at keep 0.6, and beside it a folder with a task."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        made = ("compress", *QUICK, "--ratio", 0.6, "--set", "compress.evaluate=false")
        succeed(*made, "--output", folder / "model")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(each) + "\n" for each in _QUESTIONS))
    (folder / "own").mkdir()
    (folder / "own" / "endings.yaml").write_text(_YAML.format(path=questions))
    return folder


@pytest.fixture
def asked(compressed: Path) -> tuple[object, ...]:
    """A command that asks the task of the compressed model and of the dense one."""
    own = ("--task-path", compressed / "own", "--tasks", "endings", "--dtype", "float32")
    return ("eval", compressed / "model", *_TEXT, "--baseline", "demo", *own)


def expected_accuracy(folder: Path | str) -> float:
    """Ask the questions with transformers alone: the likeliest of the choices is the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    for each in _QUESTIONS:
        question, found = str(each["question"]), []
        for choice in each["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(f"{question} {choice}", return_tensors="pt").input_ids
            start = len(tokenizer(question).input_ids)
            with torch.inference_mode():
                logs = model(ids).logits[0, :-1].float().log_softmax(-1)
            rows = range(start - 1, ids.shape[1] - 1)
            found.append(sum(float(logs[i, ids[0, i + 1]]) for i in rows))
        right += found.index(max(found)) == each["label"]
    return right / len(_QUESTIONS)


def test_scores_are_those_of_transformers_and_kept(
    compressed: Path, asked: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hisvd_cli.modeling.sources.source import DEMO_FOLDER

    document = holds(as_json(*asked, "--csv", "t.csv", "--markdown", "t.md"), schemas.EVAL)
    (own,), (dense,) = document["tasks"], document["baseline"]["tasks"]
    assert own["value"] == pytest.approx(expected_accuracy(compressed / "model"))
    assert dense["value"] == pytest.approx(expected_accuracy(DEMO_FOLDER))
    p = own["value"]  # the error of a mean of zeros and ones
    assert own["stderr"] == pytest.approx((p * (1 - p) / (len(_QUESTIONS) - 1)) ** 0.5)
    assert (own["task"], own["metric"], own["questions"]) == ("endings", "acc", 6)

    rows = [row for row in csv.DictReader((here / "t.csv").open()) if row["metric"]]
    assert [float(row["value"]) for row in rows] == [dense["value"], own["value"]]
    assert f"| endings | 0 | acc | {p:.4f} ± {own['stderr']:.4f} |" in (here / "t.md").read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "load_source", refuse)
        assert as_json(*asked) == document
        shown = succeed(*asked, env={"COLUMNS": "80", "NO_COLOR": "1"}).stdout
        assert "Tasks (lm-eval)" in shown
        assert max(map(len, shown.splitlines())) <= 80
    some = as_json(*asked, "--limit", 4, "--num-fewshot", 1)["tasks"][0]
    assert (some["questions"], some["num_fewshot"]) == (4, 1)


def test_changed_questions_are_asked_anew(asked: tuple[object, ...], tmp_path: Path) -> None:
    before = as_json(*asked)["tasks"][0]
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(each) + "\n" for each in _QUESTIONS[:3]))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "endings.yaml").write_text(_YAML.format(path=changed))
    after = as_json(*asked, "--task-path", folder)["tasks"][0]
    assert (before["questions"], after["questions"]) == (6, 3)


def test_tasks_that_cannot_be_asked(compressed: Path, tmp_path: Path) -> None:
    command = ("eval", compressed / "model", *_TEXT)
    message, hint = fail(*command, "--tasks", "arc_eazy", code=2)
    assert "no task 'arc_eazy'" in message
    assert "'arc_easy'" in hint
    elsewhere = _YAML.format(path="x").replace("dataset_path: json", "dataset_path: a/set")
    (tmp_path / "endings.yaml").write_text(elsewhere)
    message, hint = fail(*command, "--tasks", "endings", "--task-path", tmp_path)
    assert "data of task 'endings' cannot be loaded" in message
    assert "--task-path" in hint
    message, _ = fail(*command, "--tasks", "x", "--task-path", compressed / "absent", code=2)
    assert "is not a folder" in message


def test_reading_the_list_of_tasks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the list is read, which takes lm-eval up to a minute."""

    class TaskManager:
        all_tasks = ("arc_easy",)

        def __init__(self, include_path: str | None) -> None:
            assert include_path is None
            sys.stderr.write("now read\n")

    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", types.ModuleType("lm_eval.tasks"))
    monkeypatch.setattr(sys.modules["lm_eval.tasks"], "TaskManager", TaskManager, raising=False)
    shown = hisvd("eval", "demo", *_TEXT, "--tasks", "nosuch").stderr
    assert "no task 'nosuch'" in shown
    assert shown.index("Reading the list of tasks") < shown.index("now read")


def test_lm_eval_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message, hint = fail("eval", "demo", *_TEXT, "--tasks", "arc_easy", code=2)
    assert "not installed" in message
    assert "pip install 'hisvd[eval]'" in hint


@pytest.mark.slow
def test_the_command_line_of_lm_eval_takes_compressed_folders(
    compressed: Path, asked: tuple[object, ...], tmp_path: Path
) -> None:
    """With hisvd installed and nothing else, and with the numbers that ``hisvd eval`` finds."""
    model = f"pretrained={compressed / 'model'},trust_remote_code=True,dtype=float32"
    own = ("--tasks", "endings", "--include_path", str(compressed / "own"), "--num_fewshot", "2")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, *own),
            *("--device", "cpu", "--output_path", str(tmp_path / "out")),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/**/results_*.json")
    theirs = json.loads(path.read_text())["results"]["endings"]
    ours = as_json(*asked, "--num-fewshot", 2)["tasks"][0]
    assert ours["value"] == theirs["acc,none"]
    assert ours["stderr"] == pytest.approx(theirs["acc_stderr,none"])
