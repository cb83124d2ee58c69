"""Ids beyond a model's embeddings, and dtypes that a config names but torch does not have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hisvd_cli.calibration.text.token_ids import known_ids
from hisvd_cli.modeling.sources.opening import open_source
from tests.cli_helpers import as_json, fail, succeed, text_file
from tests.conftest import MakeModel
from tests.models import VOCABULARY, edit_json


@pytest.fixture
def larger(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A model whose tokenizer has more tokens than it has embeddings."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama_untied"), folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    free = VOCABULARY - len(tokenizer)
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(free + 3)])
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == VOCABULARY + 3
    return folder


@pytest.mark.parametrize("command", ["eval", "calibrate", "compress", "recover"])
def test_an_id_beyond_the_vocabulary_is_named_before_the_work(
    command: str, larger: Path, tmp_path: Path
) -> None:
    fine = text_file(tmp_path, 300)
    bad = tmp_path / "bad.txt"
    ids = PreTrainedTokenizerFast.from_pretrained(larger)
    token = ids.convert_ids_to_tokens(VOCABULARY + 2)
    bad.write_text(fine.read_text() + f" {token} " + fine.read_text())
    common = ("--samples", 4, "--seqlen", 32)
    words: dict[str, tuple[object, ...]] = {
        "eval": ("eval", larger, "--dataset", bad, "--seqlen", 32),
        "calibrate": ("calibrate", "--model", larger, "--dataset", bad, *common),
        "compress": (
            *("compress", "--model", larger, "--dataset", bad, *common, "--ratio", 0.7),
            *("-o", tmp_path / "made"),
        ),
        "recover": (
            *("compress", "--model", larger, "--dataset", fine, *common, "--ratio", 0.7),
            *("-o", tmp_path / "made", "--recover", "distill", "--recover-dataset", bad),
            *("--recover-seqlen", 32, "--no-evaluate"),
        ),
    }
    message, hint = fail(*words[command])
    assert f"returns id {VOCABULARY + 2} ('{token}')" in message
    assert f"({VOCABULARY + 3} tokens)" in message
    assert f"has {VOCABULARY} embeddings" in message
    assert "tokenizer" in hint


def test_a_larger_tokenizer_is_fine_where_no_text_needs_it(larger: Path, tmp_path: Path) -> None:
    options = ("--dataset", text_file(tmp_path, 300), "--seqlen", 32)
    assert as_json("eval", larger, *options)["results"][0]["perplexity"] > 1


def test_text_that_a_model_writes_begins_with_an_id_that_it_has(larger: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(larger)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(VOCABULARY + 1)
    tokenizer.save_pretrained(larger)
    options = ("--dataset", "self", "--samples", 2, "--seqlen", 16)
    message, _ = fail("calibrate", "--model", larger, *options)
    assert f"returns id {VOCABULARY + 1}" in message


def test_ids_of_no_text_at_all(tiny_model: MakeModel) -> None:
    assert not known_ids(torch.tensor([]), open_source(str(tiny_model("llama")))).numel()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("said", ["auto", "bf16", "torch.bfloat16", "", "nn", 7, ["x"]])
def test_a_config_that_names_a_dtype_which_torch_does_not_have(
    key: str, said: object, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, key: said}))
    data = ("--dataset", text_file(tmp_path, 300), "--seqlen", 32)
    for words in (
        ("inspect", folder),
        ("eval", folder, *data, "--stream", "on"),
        ("eval", folder, *data, "--stream", "off"),
        ("compress", "--model", folder, *data, "--samples", 4, "--ratio", 0.7),
    ):
        message, hint = fail(*words)
        assert f"config.json of {folder} has the {key} {said!r}" in message
        assert "bfloat16" in hint


def test_a_config_that_names_float8_gives_a_checkpoint_in_the_stored_dtype(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(tiny_model("llama"), folder)
    edit_json(folder / "config.json", dtype="float8_e4m3fn")
    data = ("--dataset", text_file(tmp_path, 300), "--samples", 4, "--seqlen", 32)
    succeed("compress", "--model", folder, *data, "--ratio", 0.7, "-o", made, "--no-evaluate")
    assert json.loads((made / "config.json").read_text())["dtype"] == "float32"
