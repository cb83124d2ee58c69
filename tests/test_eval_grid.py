"""``hisvd eval`` of several models: one table, every form of it, and what was measured reused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hisvd_cli.modeling import passes
from hisvd_cli.pipelines.evaluating import measuring
from tests import schemas
from tests.cli_helpers import as_json, fail, hisvd, succeed, text_file
from tests.models import save_model, save_tokenizer

SEQLEN = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, pairs at keep 0.8, pivoted ones at 0.4, and a text."""
    folder = tmp_path_factory.mktemp("grid")
    dense = save_model("llama", folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        text = ("--dataset", text_file(folder, seed=1), "--samples", 8, "--seqlen", 64)
        made = ("compress", "--model", dense, *text)
        succeed(*made, "--ratio", 0.8, "--output", folder / "good")
        succeed(*made, "--ratio", 0.4, "--storage", "pivoted", "--output", folder / "small")
    return folder


@pytest.fixture
def words(models: Path, tmp_path: Path) -> tuple[object, ...]:
    """Flags of an evaluation against the dense model."""
    text = text_file(tmp_path, 700, seed=2)
    return ("--dataset", text, "--seqlen", SEQLEN, "--windows", 10, "--baseline", models / "dense")


def holds(document: Any, schema: schemas.Schema) -> Any:
    jsonschema.Draft202012Validator(schema).validate(document)
    return document


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the name of each model that is opened to be run."""
    opened: list[str] = []
    real: Callable[..., Any] = passes.open_pass

    def noting(source: Any, how: Any) -> Any:
        opened.append(Path(source.name).name)
        return real(source, how)

    monkeypatch.setattr(measuring, "open_pass", noting)
    return opened


def test_cards_of_checkpoints_take_the_results(
    models: Path, words: tuple[object, ...], here: Path
) -> None:
    made = shutil.copytree(models / "good", here / "good")
    document = as_json("eval", made, models / "small", *words, "--update-card")
    for folder, each in zip((made, models / "small"), document["evaluations"], strict=True):
        (result,) = ModelCard.load(folder / "README.md").data.eval_results
        found = each["results"][0]["perplexity"]
        assert result.metric_type == "perplexity"
        assert result.metric_value == pytest.approx(found, rel=1e-4)
        dense = document["baseline"]["results"][0]["perplexity"]
        assert result.metric_args["dense"] == pytest.approx(dense, rel=1e-4)
    assert not (models / "dense" / "README.md").exists()
    again = as_json("eval", made, *words)  # a card is no part of what was measured
    assert again["results"] == document["evaluations"][0]["results"]
    (made / "README.md").unlink()
    assert "has no README.md" in fail("eval", made, *words, "--update-card")[0]


def test_a_grid_in_every_form(
    models: Path, words: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_passes(monkeypatch)
    targets = (models / "small", models / "good")
    command = ("eval", *targets, *words, "--csv", "made/t.csv", "--markdown", "t.md")
    document = holds(as_json(*command), schemas.EVALS)
    assert opened == ["dense", "small", "good"]  # one pass of each

    small, good = (each["results"][0] for each in document["evaluations"])
    assert 0 < good["kl"] < small["kl"]
    assert 1 > good["agreement"] > small["agreement"]
    low, high = good["intervals"]["kl"]
    assert low < good["kl"] < high
    (found,) = [each for each in document["comparisons"] if each["figure"] == "kl"]
    assert found["better"] == str(models / "good")
    assert found["difference"] == pytest.approx(small["kl"] - good["kl"])
    beside = document["evaluations"][0]["comparisons"]
    assert [(each["figure"], each["other"]) for each in beside] == [
        ("nats_per_token", str(models / "dense"))
    ]

    lines = list(csv.DictReader((here / "made" / "t.csv").open()))
    assert [Path(line["model"]).name for line in lines] == ["dense", "small", "good"]
    assert float(lines[2]["kl_low"]) == low
    assert lines[0]["kl"] == ""
    table = (here / "t.md").read_text()
    assert f"{good['kl']:.4f} ({low:.4f}–{high:.4f})" in table
    shown = succeed(*command, env={"COLUMNS": "80", "NO_COLOR": "1"}).stdout
    assert "KL: good > small" in shown
    assert "(baseline)" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert opened == ["dense", "small", "good"]  # the second run measured nothing
    assert not list((here.parent / "hisvd-cache" / "evaluations").glob("states*"))


def test_what_was_measured_is_reused_and_fresh_measures_again(
    models: Path, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_passes(monkeypatch)
    one = holds(as_json("eval", models / "good", *words), schemas.EVAL)
    assert opened == ["dense", "good"]
    alone = as_json("eval", models / "good", *words[:-2])  # likelihoods are known already
    assert alone["results"][0]["perplexity"] == one["results"][0]["perplexity"]
    assert alone["results"][0]["kl"] is None
    assert opened == ["dense", "good"]
    both = as_json("eval", models / "good", models / "small", *words)
    assert both["evaluations"][0] == one
    assert opened == ["dense", "good", "dense", "small"]
    assert as_json("eval", models / "good", *words, "--fresh") == one
    assert opened[4:] == ["dense", "good"]


@pytest.mark.parametrize("name", ["good", "small"])
def test_streamed_numbers_are_the_same(name: str, models: Path, words: tuple[object, ...]) -> None:
    whole = as_json("eval", models / name, *words, "--stream", "off")
    assert as_json("eval", models / name, *words, "--stream", "on", "--fresh") == whole


def test_weights_that_do_not_fit_are_streamed(
    models: Path, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_memory", lambda _: 1000)
    result = hisvd("eval", models / "good", *words, "--verbose")
    assert result.exit_code == 0
    assert "does not fit in memory: running one block at a time" in result.stderr


def test_divergence_is_that_of_transformers_and_numpy(
    models: Path, words: tuple[object, ...]
) -> None:
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "dense")
    ids = tokenizer(Path(str(words[1])).read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: 10 * SEQLEN].view(10, SEQLEN)
    logs = []
    for name in ("dense", "good"):
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        with torch.no_grad():
            x = model(windows).logits[:, :-1].double().numpy()
        logs.append(x - np.log(np.exp(x).sum(-1, keepdims=True)))
    p, q = logs
    result = as_json("eval", models / "good", *words)["results"][0]
    assert result["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert result["agreement"] == (p.argmax(-1) == q.argmax(-1)).mean()


def test_a_failing_model_leaves_the_others(
    models: Path, words: tuple[object, ...], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "good", broken)
    (broken / "model.safetensors").unlink()
    result = hisvd("eval", broken, models / "absent.pt", models / "good", *words, "--json")
    assert result.exit_code == 1
    document = holds(json.loads(result.stdout), schemas.EVALS)
    assert [each["model"] for each in document["evaluations"]] == [str(models / "good")]
    failed = {each["model"] for each in document["failures"]}
    assert failed == {str(models / "absent.pt"), str(broken)}
    assert len(document["failures"]) == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2
    message, _ = fail("eval", broken, *words)
    assert "has no weights" in message


def test_another_tokenizer_gives_no_divergence(
    models: Path, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models / "dense", other)
    monkeypatch.setattr("tests.models._TEXT", "words of another kind and letters")
    save_tokenizer(other)
    result = hisvd("eval", other, *words, "--json")
    assert "have different tokenizers: " in result.stderr
    document = holds(json.loads(result.stdout), schemas.EVAL)
    found = document["results"][0]
    assert found["kl"] is None
    assert document["comparisons"] == []
    assert found["bits_per_byte"] > 0
    assert found["bytes"] != document["baseline"]["results"][0]["bytes"]


def test_logits_that_are_not_finite(
    models: Path, words: tuple[object, ...], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "good", broken)
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    result = as_json("eval", broken, *words)["results"][0]
    assert (result["perplexity"], result["kl"]) == (None, None)
    assert result["nonfinite_windows"] == list(range(10))
    assert "not finite (window 0)" in succeed("eval", broken, *words).stdout


def test_reports_that_cannot_be_written_stop_before_the_work(
    models: Path, words: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_passes(monkeypatch)
    (here / "file").write_text("keep")
    (here / "folder").mkdir()
    for flag in ("--csv", "--markdown"):
        message, _ = fail("eval", models / "good", *words, flag, here / "file" / "x")
        assert "is not writable" in message
        message, _ = fail("eval", models / "good", *words, flag, here / "folder")
        assert "is a folder" in message
    assert opened == []


def test_an_interrupted_grid_goes_on(
    models: Path, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the last model: the others, and the baseline's states, are there already."""
    whole = as_json("eval", models / "small", models / "good", *words, "--stream", "off")
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / "other-cache"))
    real = passes.open_pass

    def stopping(source: Any, how: Any) -> Any:
        if source.name.endswith("good"):
            raise KeyboardInterrupt
        return real(source, how)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "open_pass", stopping)
        assert hisvd("eval", models / "small", models / "good", *words).exit_code == 130
    opened = count_passes(monkeypatch)
    assert as_json("eval", models / "small", models / "good", *words) == whole
    assert opened == ["good"]
