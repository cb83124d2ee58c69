"""The ``--json`` documents: one on stdout, exactly the keys that were promised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests import schemas
from tests.cli_helpers import as_json, hisvd, text_file
from tests.conftest import MakeModel


def holds(document: Any, schema: schemas.Schema) -> Any:
    """Check a document strictly, and return it."""
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    return document


@pytest.fixture
def quick(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, ...]:
    """Flags of a calibration that takes a moment, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = text_file(tmp_path)
    return ("--model", tiny_model("llama"), "--dataset", text, "--samples", 4, "--seqlen", 32)


def test_calibrate(quick: tuple[object, ...]) -> None:
    document = holds(as_json("calibrate", *quick), schemas.CALIBRATE)
    assert Path(document["output"], "calibration.json").is_file()
    assert document["data"]["tokens"] == 4 * 32
    holds(as_json("calibrate", *quick, "--dry-run"), schemas.CALIBRATE_FORECAST)


@pytest.mark.parametrize("allocator", ["hisvd", "uniform"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_plan(allocator: str, calibrated: bool, quick: tuple[object, ...]) -> None:
    if calibrated:
        as_json("calibrate", *quick)
    words = ("plan", *quick, "--allocator", allocator, "--ratio", 0.6)
    document = holds(as_json(*words), schemas.PLAN)
    assert document["ratio"] == document["settings"]["ratio"] == 0.6
    assert (document["provenance"]["calibration"] is not None) is calibrated
    for row in document["sublayers"]:
        m, n = row["shape"]
        assert row["full_rank"] == min(m, n)
        assert row["parameters"] == (m * n if row["dense"] else row["rank"] * (m + n))
    kept = sum(row["parameters"] for row in document["sublayers"])
    assert kept == document["kept_parameters"] <= document["budget_parameters"]
    assert document["predicted_loss"] == pytest.approx(
        sum(r["loss"] for r in document["sublayers"])
    )


def test_plans(quick: tuple[object, ...]) -> None:
    document = holds(as_json("plan", *quick, "--ratio", 0.8, "--ratio", 0.5), schemas.PLANS)
    assert [plan["ratio"] for plan in document["plans"]] == [0.8, 0.5]


def test_the_plan_on_disk_is_the_plan_printed(quick: tuple[object, ...], tmp_path: Path) -> None:
    document = as_json("plan", *quick, "--output", "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == document


@pytest.mark.parametrize("output", ["made", "made.pt"])
def test_compress(output: str, quick: tuple[object, ...]) -> None:
    words = ("compress", *quick, "--ratio", 0.6, "--output", output)
    holds(as_json(*words, "--dry-run"), schemas.COMPRESS_FORECAST)
    assert not Path(output).exists()
    document = holds(as_json(*words), schemas.COMPRESS)
    assert document["output"] == output
    assert document["perplexity"] is None
    assert document["peak_memory_bytes"] > 100_000_000  # torch alone takes more
    plan = holds(json.loads(Path(document["plan"]).read_text()), schemas.PLAN)
    assert plan["kept_parameters"] == document["kept_parameters"]
    files = [Path(output)] if output.endswith(".pt") else Path(output).glob("*.safetensors")
    assert document["bytes"] == sum(path.stat().st_size for path in files)
    if not output.endswith(".pt"):
        holds(json.loads(Path(output, "hisvd.json").read_text()), schemas.PROVENANCE)


def test_compress_with_perplexity(quick: tuple[object, ...], tmp_path: Path) -> None:
    other = text_file(tmp_path, 300, seed=5)
    evaluating = ("--evaluate", "--set", f"eval.dataset={other}", "--set", "eval.seqlen=32")
    document = holds(as_json("compress", *quick, *evaluating), schemas.COMPRESS)
    assert document["perplexity"]["before"] > 1
    assert document["perplexity"]["after"] > 1


def test_eval(quick: tuple[object, ...], tmp_path: Path) -> None:
    as_json("compress", *quick, "--output", "made")
    other, third = text_file(tmp_path, 300, seed=5), text_file(tmp_path, 300, seed=6)
    words = ("eval", "made", "--dataset", other, "--seqlen", 32)
    document = holds(as_json(*words), schemas.EVAL)
    assert document["baseline"] is None
    (result,) = document["results"]
    assert result["tokens"] == result["windows"] * 31
    more = ("--dataset", third, "--windows", 2, "--baseline", quick[1])
    document = holds(as_json(*words, *more), schemas.EVAL)
    assert [row["windows"] for row in document["results"]] == [2, 2]
    assert document["baseline"]["model"] == str(quick[1])


def made_of_all_kinds(quick: tuple[object, ...], tmp_path: Path) -> Iterator[tuple[str, object]]:
    calibration = tmp_path / "calibration"
    as_json("calibrate", *quick, "--calibration", calibration)
    as_json("plan", *quick, "--output", "plan.json")
    as_json("compress", *quick, "--output", "made")
    as_json("convert", "made", "--to", "pt", "--output", "made.pt")
    yield from (("calibration", calibration), ("plan", "plan.json"), ("checkpoint", "made"))
    yield from (("pt", "made.pt"), ("model", quick[1]))


def test_inspect(quick: tuple[object, ...], tmp_path: Path) -> None:
    for kind, target in made_of_all_kinds(quick, tmp_path):
        document = holds(as_json("inspect", target), schemas.INSPECT)
        assert document["kind"] == kind
        assert document["problems"] == []
        assert bool(document["sublayers"]) is (kind != "calibration")


@pytest.mark.parametrize("form", ["hf", "pt", "dense"])
def test_convert(form: str, quick: tuple[object, ...]) -> None:
    as_json("compress", *quick, "--output", "made")
    output = "other.pt" if form == "pt" else "other"
    document = holds(as_json("convert", "made", "--to", form, "--output", output), schemas.CONVERT)
    files = [Path(output)] if form == "pt" else Path(output).glob("*.safetensors")
    assert document["bytes"] == sum(path.stat().st_size for path in files)


def test_stdout_holds_one_document_beside_warnings(quick: tuple[object, ...]) -> None:
    result = hisvd("plan", *quick, "--json")
    assert "Warning: " in result.stderr
    json.loads(result.stdout)
    result = hisvd("plan", "--model", "absent/model", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
