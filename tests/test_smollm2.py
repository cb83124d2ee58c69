"""The whole path on a real model, through the installed command: the figures that it must reach.

Needs SmolLM2-135M-Instruct as GGUF (``HISVD_SMOLLM2``, see .ci/run) and the shared WikiText-2.
Protocol: calibration on 8 × 512 tokens of validation, evaluation on 8 windows of 1024 of test. It
is smaller than that of tests/benchmarks/smollm2.py, whose figures the manual reports.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

DATA = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"
GGUF = os.environ.get("HISVD_SMOLLM2", "")
WINDOWS = 8
MODELS = {
    "uniform-0.8": ["--allocator", "uniform"],
    "hisvd-0.8": [],
    "best-0.8": ["--preset", "best"],
    "hisvd-0.6": [],
    "best-0.6": ["--preset", "best"],
}
"""Folder, which ends in the keep ratio → options of its compression."""
LIMITS = {"hisvd-0.8": 98.0, "best-0.8": 42.5, "hisvd-0.6": 600.0, "best-0.6": 105.5}
"""Folder → perplexity that it must reach, a little above what was measured: 97.6, 42.3, 598, 104.9.
From so few calibration tokens it is far above that in the manual."""
ROOM = 1.03  # bfloat16 products are rounded differently by other processors and thread counts
THREADS = os.environ.get("OMP_NUM_THREADS", "1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.timeout(2400),
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(not Path(GGUF).is_file(), reason="HISVD_SMOLLM2 names no .gguf file"),
    pytest.mark.skipif(not DATA.is_dir(), reason="the shared WikiText-2 is not here"),
]


def _hisvd(folder: Path, *arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_run(folder, *arguments).stdout)
    return document


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    threads = {"OMP_NUM_THREADS": THREADS, "HISVD_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hisvd")), *arguments, "--json"],
        cwd=folder,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2 calibrated in ``calibration``."""
    folder = tmp_path_factory.mktemp("smollm2")
    text = str(DATA / "validation.tokens.txt")
    options = ["--dataset", text, "--samples", "8", "--seqlen", "512", "--gradients"]
    _hisvd(folder, "calibrate", "--model", GGUF, "--calibration", "calibration", *options)
    return folder


@pytest.fixture(scope="module")
def made(workspace: Path) -> dict[str, dict[str, Any]]:
    """Folder → what ``compress`` reports, of all models."""
    common = ["compress", "--model", GGUF, "--calibration", "calibration"]
    return {
        target: _hisvd(workspace, *common, *options, "--ratio", target[-3:], "--output", target)
        for target, options in MODELS.items()
    }


@pytest.fixture(scope="module")
def evaluated(workspace: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The evaluation of all models beside the original."""
    return _evaluate(workspace, *made, "--baseline", GGUF)


def _evaluate(folder: Path, *targets: str, windows: int = WINDOWS) -> dict[str, Any]:
    options = ["--dataset", str(DATA / "test.raw.txt"), "--seqlen", "1024"]
    return _hisvd(folder, "eval", *targets, *options, "--windows", str(windows))


def test_dense_perplexity_equals_an_independent_loop(workspace: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = next((workspace / "cache" / "gguf").iterdir())
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    text = (DATA / "test.raw.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(model_folder)(text, return_tensors="pt").input_ids
    losses = []
    for start in (0, 1024, 2048):
        window = ids[:, start : start + 1024]
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    by_hand = math.exp(sum(losses) / len(losses))
    measured = _evaluate(workspace, GGUF, "--dtype", "float32", windows=3)
    assert measured["results"][0]["perplexity"] == pytest.approx(by_hand, rel=1e-3)


def test_plan_is_exact_and_computes_spectra_once(workspace: Path) -> None:
    command = ["plan", "--model", GGUF, "--calibration", "calibration", "--ratio", "0.6"]
    _run(workspace, *command)
    again = _run(workspace, *command)
    assert "Computing spectra" not in again.stderr
    plan = json.loads(again.stdout)
    total = sum(math.prod(row["shape"]) for row in plan["sublayers"])
    assert 0 <= 0.6 * total - plan["kept_parameters"] <= 0.0005 * total
    assert len(plan["sublayers"]) == 210


@pytest.mark.parametrize("target", MODELS)
def test_a_model_has_the_size_that_was_asked_for(
    workspace: Path, made: dict[str, dict[str, Any]], target: str
) -> None:
    audit = _hisvd(workspace, "inspect", target)
    assert audit["problems"] == []
    assert float(target[-3:]) - 0.0005 <= audit["ratio"] <= float(target[-3:])
    assert audit["bytes"] == made[target]["bytes"]
    assert made[target]["peak_memory_bytes"] < 538e6 + 350e6 + 1e9  # the model, imports, and 1 GB


@pytest.mark.parametrize("target", LIMITS)
def test_a_model_reaches_its_perplexity(evaluated: dict[str, Any], target: str) -> None:
    rows = [*evaluated["evaluations"], evaluated["baseline"]]
    perplexity = {each["model"]: each["results"][0]["perplexity"] for each in rows}
    assert perplexity[GGUF] < perplexity[target] <= LIMITS[target] * ROOM


@pytest.mark.parametrize("figure", ["kl", "nats_per_token", "agreement"])
def test_eight_windows_order_the_methods(evaluated: dict[str, Any], figure: str) -> None:
    better = {
        (each["model"], each["other"]): each["better"]
        for each in evaluated["comparisons"]
        if each["figure"] == figure
    }
    for one, other in (
        ("best-0.8", "hisvd-0.8"),
        ("best-0.8", "uniform-0.8"),
        ("hisvd-0.8", "uniform-0.8"),
        ("best-0.6", "hisvd-0.6"),
    ):
        pair = (one, other) if (one, other) in better else (other, one)
        assert better[pair] == one


def test_truncation_error_is_the_predicted_loss(workspace: Path) -> None:
    """Per sublayer: discarded energy by the plan against the error of factors made in float64."""
    from hisvd_cli.allocation.plan import load_plan
    from hisvd_cli.calibration.store import open_calibration
    from hisvd_cli.compression.methods import DECOMPOSERS
    from hisvd_cli.linalg.statistics import Statistics
    from hisvd_cli.modeling.sources.weights import open_weights

    plan_path = workspace / "plan.json"
    options = ["--calibration", "calibration", "--ratio", "0.6", "--output", str(plan_path)]
    _hisvd(workspace, "plan", "--model", GGUF, *options)
    calibration = open_calibration(workspace / "calibration")
    weights = open_weights(next((workspace / "cache" / "gguf").iterdir()))
    rows = [s for s in load_plan(plan_path).sublayers if s.layer in (0, 15, 29) and not s.dense]
    assert len(rows) >= 15
    for row in rows:
        weight = weights.read(f"{row.name}.weight").double()
        moment = calibration.moments(row.layer)[row.name]
        u, v = DECOMPOSERS.get("whitened")(weight, Statistics(moment), row.rank)
        if moment.side == "input":
            difference = weight - u @ v
            error = float(
                torch.einsum("ij,jk,ik->", difference, moment.matrix.double(), difference)
            )
        else:
            left = torch.eye(weight.shape[0], dtype=torch.float64) - u @ u.T
            error = float((left @ moment.matrix.double() @ left).trace())
        assert error == pytest.approx(row.loss, rel=1e-4), row.name
