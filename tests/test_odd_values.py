"""Odd values in files and options that ended as unforeseen errors: each is two clear lines now."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.evaluation.store import Store
from hisvd_cli.modeling.checkpoints.checkpoint import Checkpoint
from hisvd_cli.modeling.layers.transformers_plugin import HiSVDConfig
from hisvd_cli.pipelines.config.settings import SECTIONS, item_of, kind_of
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.artifact import building, partial_path
from hisvd_cli.utils.files.fingerprints import cache_root, file_digest
from hisvd_cli.utils.files.json_files import parse_json
from hisvd_cli.utils.files.tensorfile import read_header
from tests.cli_helpers import as_json, fail, hisvd, perplexity, succeed, text_file, two_lines
from tests.conftest import MakeModel
from tests.models import edit_json

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
UP = "model.layers.0.mlp.up_proj"

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def model(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def made(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its calibration and its plan; do not edit them."""
    folder = tmp_path_factory.mktemp("made")
    words = ("--model", tiny_model("llama"), "--calibration", folder / "calibration")
    text = ("--dataset", text_file(folder, 400), "--samples", 2, "--seqlen", 16)
    succeed("calibrate", *words, *text)
    succeed("compress", *words, "--ratio", 0.6, "--output", folder / "checkpoint")
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DEEP, "nested too deep"),
        ("[" * 200 + "]" * 200, "levels deep"),
        ('{"a": ' + DIGITS + "}", "digits"),
        ("[1e999]", "too large"),
        ("[NaN]", "NaN"),
        (f"[{10**30}]", "64 bits"),
        ('["\\ud800"]', "surrogate"),
        (b'"\xed\xa0\x80"', "decode"),
    ],
)
def test_json_that_is_odd_is_a_value_error(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_json(text)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("value", [DEEP, DIGITS, '"\\ud800"'], ids=["deep", "digits", "surrogate"])
def test_lines_of_text_with_a_surrogate_deep_or_huge_values(
    value: str, suffix: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_text('{"text": "words"}\n{"text": ' + value + "}\n")
    message, _ = fail("calibrate", "--model", model, "--dataset", path)
    assert f"{path} is not valid JSON in line 2" in message
    assert "sys." not in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--seed", 1 << 64),
        ("--seed", DIGITS),
        ("--max-shard-size", "1e300"),
        ("--stages", 999_999_999_999_999),
        ("--samples", 10**30),
        ("--max-memory", f"{DIGITS}GB"),
        ("--recover-seed", 1 << 63),
        ("--drop", "a\0b"),
    ],
)
def test_an_option_out_of_all_bounds(flag: str, value: object) -> None:
    words = ("compress", "--model", "demo", "--dry-run")
    message, hint = fail(*words, flag, value, code=2)
    assert message.startswith(flag)
    assert "must be" in message or "digits" in message
    assert hint
    assert len(message) < 500


def test_every_numeric_setting_has_bounds() -> None:
    for section, fields in SECTIONS.items():
        for key, field in fields.model_fields.items():
            if item_of(kind_of(section, key)) not in (int, float):
                continue
            found = [*field.metadata, *_inner(field.annotation)]
            assert any(isinstance(each, Ge | Gt) for each in found), (section, key)
            assert any(isinstance(each, Le | Lt) for each in found), (section, key)


def _inner(annotation: Any) -> list[Any]:
    """Return the bounds that stand inside an annotation, of the items of a list."""
    found = list(getattr(annotation, "metadata", []))
    for each in found:
        found = [*found, *getattr(each, "metadata", [])]
    return found + [bound for each in get_args(annotation) for bound in _inner(each)]


def write_header(path: Path, header: object) -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        DEEP,
        "[]",
        "null",
        '{"a": ' + DIGITS + "}",
        {"a": 3},
        {"a": {**GOOD, "dtype": 3}},
        {"a": {**GOOD, "dtype": ["F32"]}},
        {"a": {**GOOD, "shape": [True, 2]}},
        {"a": {**GOOD, "shape": [-2]}},
        {"a": {**GOOD, "shape": [3]}},
        {"a": {**GOOD, "shape": [10**30]}},
        {"a": {**GOOD, "shape": "2"}},
        {"a": {**GOOD, "data_offsets": [8, 0]}},
        {"a": {**GOOD, "data_offsets": [0, "8"]}},
        {"a": {**GOOD, "data_offsets": [0.0, 8.0]}},
        {"a": {**GOOD, "data_offsets": [0, 8, 8]}},
        {"a": {**GOOD, "data_offsets": [0, 4], "shape": [1]}, "b": GOOD},
        {"a": GOOD, "__metadata__": 3},
        {"a": GOOD, "__metadata__": {"block": 3}},
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_safetensors_header_that_is_odd(header: object, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"x\.safetensors"):
        read_header(write_header(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ([], "it is not a JSON object"),
        ({"a": []}, "a has no dtype, shape or data offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "a has no dtype, shape or data offsets"),
        ({"a": {**GOOD, "shape": 3}}, "a has no dtype, shape or data offsets"),
    ],
)
def test_what_is_wrong_with_a_header_is_told_in_words(
    header: object, told: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        read_header(write_header(tmp_path / "x.safetensors", header))
    assert f"has no valid safetensors header: {told}." in caught.value.message


@pytest.mark.parametrize(
    ("dtype", "told"), [("F6_E9", "have the dtype F6_E9"), (None, "have no tensors")]
)
def test_weights_of_an_odd_dtype_or_none(dtype: str | None, told: str, model: Path) -> None:
    header = {"a": {**GOOD, "dtype": dtype}} if dtype else {}
    path = write_header(model / "model.safetensors", header)
    if not dtype:
        path.write_bytes(path.read_bytes()[:-8])
    assert told in fail("eval", model, "--dataset", "demo", "--seqlen", 16)[0]


def test_an_empty_quantization_config_is_none(model: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path, 300)
    before = perplexity(model, text, "off")
    empty: list[object] = [{}, None]
    for value in empty:
        edit_json(model / "config.json", quantization_config=value)
        assert as_json("inspect", model)["problems"] == []
        for stream in ("off", "on"):
            assert perplexity(model, text, stream) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("value", [[1], "int8", 3, True])
def test_a_quantization_config_that_is_no_object(value: object, model: Path) -> None:
    edit_json(model / "config.json", quantization_config=value)
    for words in (("inspect", model), ("plan", "--model", model), ("eval", model)):
        message, _ = fail(*words)
        assert "config" in message


@pytest.mark.parametrize("rank", [10**30, True, False, 0, -1, "3", 2.0, None, [3]])
def test_a_rank_that_is_none_for_all_readers(rank: object, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["ranks"][UP] = rank
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ranks"):
        HiSVDConfig(**config["quantization_config"])
    with pytest.raises(SourceError, match="ranks"):
        _ = Checkpoint(checkpoint, config).ranks
    for words in (("inspect", checkpoint), ("eval", checkpoint, "--dataset", "demo")):
        assert "rank" in fail(*words)[0]


def test_a_rank_larger_than_its_matrix(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["ranks"][UP] = 10**6
    (checkpoint / "config.json").write_text(json.dumps(config))
    message, _ = fail("eval", checkpoint, "--dataset", "demo", "--seqlen", 16)
    assert "rank 1000000" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sublayers", 0, "rank"), True),
        (("sublayers", 0, "rank"), "3"),
        (("sublayers", 0, "rank"), 10**30),
        (("sublayers", 0, "loss"), float("nan")),
        (("sublayers",), []),
        (("ratio",), float("inf")),
        (("provenance", "model"), 3),
        (("provenance", "calibration"), [1]),
        (("settings", "storage"), []),
    ],
)
def test_a_plan_with_odd_values(path: tuple[Any, ...], value: object, checkpoint: Path) -> None:
    document = node = json.loads((checkpoint / "plan.json").read_text())
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (checkpoint / "plan.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match=r"plan\.json is not a plan"):
        load_plan(checkpoint / "plan.json")
    assert "is not a plan" in fail("inspect", checkpoint / "plan.json")[0]


@pytest.mark.parametrize("text", ['{"ratio": NaN}', DEEP, '{"ratio": 1e999}', '["\\ud800"]'])
def test_a_provenance_with_odd_values(text: str, checkpoint: Path) -> None:
    (checkpoint / "hisvd.json").write_text(text)
    assert "hisvd.json is not valid JSON" in fail("inspect", checkpoint)[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", True),
        ("samples", 0),
        ("seqlen", "16"),
        ("dataset", None),
        ("seed", float("nan")),
        ("tokens", 10**30),
    ],
)
def test_a_calibration_with_odd_values(key: str, value: object, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "calibration", tmp_path / "calibration"))
    data = json.loads((folder / "calibration.json").read_text())["data"]
    edit_json(folder / "calibration.json", data={**data, key: value})
    assert "is not a calibration" in fail("inspect", folder)[0]


def test_a_key_that_is_no_text_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    partial_path(folder).mkdir()
    (partial_path(folder) / "old").write_text("old")
    (tmp_path / ".made.hisvd.key").write_bytes(b"\xff\xfe")
    with building(folder, "key") as partial:
        assert not list(partial.iterdir())


def test_a_digest_that_is_no_text_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    known = file_digest(tmp_path / "file")
    (record,) = (cache_root() / "digests").iterdir()
    for damage in (b"\xff" * 64, b"x" * 64, b""):
        record.write_bytes(damage)
        assert file_digest(tmp_path / "file") == known


@pytest.mark.parametrize(
    "sums",
    [
        {"nats": [[1.0], [1.0]], "kl": [[1.0]], "agreed": None},
        {"nats": [1.0], "kl": None, "agreed": None},
        {"nats": [["a"]], "kl": None, "agreed": None},
        {"nats": 3, "kl": None, "agreed": None},
        {"nats": [[10**30]], "kl": None, "agreed": None},
    ],
)
def test_a_stored_evaluation_with_odd_values_is_measured_again(
    sums: object, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    store.save_document("key", {"sums": sums})
    assert store.load("key") is None


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/passwd", "", ".", "a\0b", "x/../../y"]
)
def test_an_index_that_leads_out_of_its_folder(name: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (model / "model.safetensors").rename(model / "shard.safetensors")  # it would win
    assert "not a file in its folder" in fail("inspect", model)[0]


@pytest.mark.parametrize("weight_map", [[], 3, {"a": 3}, {"a": None}, {"a": ["x"]}])
def test_an_index_of_wrong_types(weight_map: object, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / "model.safetensors").rename(model / "shard.safetensors")  # it would win
    assert "not a valid shard index" in fail("inspect", model)[0]


@pytest.mark.parametrize(
    "text", ["[plan]\nratio = " + "[" * 5000 + "]" * 5000, "a = " + DIGITS, "[" * 5000, "a=[" * 200]
)
def test_a_profile_nested_too_deep_or_of_huge_numbers(text: str, here: Path) -> None:
    (here / "odd.toml").write_text(text)
    message, _ = fail("plan", "--profile", "odd.toml", code=2)
    assert "odd.toml" in message
    result = hisvd("plan", "--set", "plan.ratio=" + "[" * 5000)
    assert "--set plan.ratio" in two_lines(result.stderr)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "many"},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 2.5},
        {"vocab_size": -1},
        {"model_type": ["llama"]},
        {"rope_parameters": 3},
        {"hidden_act": {}},
        {"architectures": 3},
        {"torch_dtype": 3},
        {"layer_types": "x"},
    ],
    ids=str,
)
def test_a_config_of_odd_content(changes: dict[str, object], model: Path) -> None:
    edit_json(model / "config.json", **changes)
    for words in (("inspect", model), ("eval", model, "--dataset", "demo", "--seqlen", 16)):
        result = hisvd(*words)
        if result.exit_code and "Error" in result.stderr:  # transformers mends a few by itself
            two_lines(result.stderr)
        assert "Internal error" not in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer.json", "\0\xff"),
        ("tokenizer.json", DEEP),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"model_max_length": "", "tokenizer_class": "GPT2Tokenizer"}'),
    ],
)
def test_a_damaged_tokenizer(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content, encoding="latin-1")
    message, _ = fail("eval", model, "--dataset", "demo", "--seqlen", 16)
    assert "tokenizer" in message


def test_a_layer_of_the_plugin_refuses_a_rank_beyond_its_matrix(tiny_model: MakeModel) -> None:
    from hisvd_cli.modeling.layers.transformers_plugin import replace_linears
    from tests.models import load_dense

    model = load_dense(tiny_model("llama"))
    assert isinstance(model.get_submodule(UP), nn.Linear)
    with pytest.raises(ValueError, match="rank 33"), torch.device("meta"):
        replace_linears(model, HiSVDConfig({UP: 33}))


def test_a_home_of_nobody_is_a_plain_name(model: Path) -> None:
    for words in (
        ("inspect", "~nosuchuser"),
        ("plan", "--model", "~nosuchuser"),
        ("calibrate", "--model", model, "--dataset", "~nosuchuser"),
    ):
        assert "~nosuchuser" in fail(*words)[0]
    (Path.cwd() / "profile.toml").write_text('[calibration]\npath = "a\\u0000b"\n')
    message, _ = fail("plan", "--model", model, "--profile", "profile.toml", code=2)
    assert "without NUL" in message
    message, _ = fail("plan", "--model", model, "--drop", "a\udcff", code=2)
    assert "UTF-8 text" in message
