"""``hisvd inspect``: sound artifacts have no problems, damaged ones are told apart."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hisvd_cli.modeling.layers.lowrank import LAYERS
from tests.cli_helpers import as_json, fail, hisvd, succeed, text_file, untouched
from tests.conftest import MakeModel
from tests.models import edit_json

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", params=LAYERS)
def made(
    tiny_model: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """A folder with a calibration, a plan, a checkpoint and a ``.pt``; do not edit them."""
    folder = tmp_path_factory.mktemp("made")
    quick = ("--model", tiny_model("llama"), "--dataset", text_file(folder), "--seqlen", 32)
    calibration = ("--samples", 4, "--calibration", folder / "calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        succeed("calibrate", *quick, *calibration)
        words = (*quick, *calibration, "--ratio", 0.6, "--storage", request.param)
        succeed("plan", *words, "--output", folder / "plan.json")
        succeed("compress", *words, "--output", folder / "checkpoint")
        packing = ("convert", folder / "checkpoint", "--to", "pt", "--output", folder / "one.pt")
        succeed(*packing)
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(made / "checkpoint", folder)
    return folder


def inspected(target: Path, *words: str) -> Any:
    """Return the document of what has problems."""
    result = hisvd("inspect", target, *words, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == bool(document["problems"]), result.output
    return document


def problems_of(target: Path, *words: str) -> list[str]:
    found: list[str] = inspected(target, *words)["problems"]
    return found


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_sound_checkpoint(made: Path, tiny_model: MakeModel) -> None:
    document = as_json("inspect", made / "checkpoint")
    plan = json.loads((made / "plan.json").read_text())
    assert document["problems"] == []
    ranks = {row["name"]: (row["rank"], row["dense"]) for row in document["sublayers"]}
    assert ranks == {row["name"]: (row["rank"], row["dense"]) for row in plan["sublayers"]}
    held = load_file(made / "checkpoint" / "model.safetensors").values()
    assert document["parameters"] == sum(tensor.numel() for tensor in held)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    assert document["dense_parameters"] == sum(p.numel() for p in dense.parameters())
    assert document["bytes"] == (made / "checkpoint" / "model.safetensors").stat().st_size
    assert document["ratio"] == plan["kept_parameters"] / sum(
        prod(row["shape"]) for row in plan["sublayers"]
    )
    assert document["model_ratio"] == pytest.approx(plan["model_ratio"], abs=1e-12)
    assert {row["dtype"] for row in document["sublayers"]} == {"float32"}
    assert document["provenance"]["allocator"] == "hisvd"


def test_one_file_says_the_same_as_the_folder(made: Path) -> None:
    one, folder = as_json("inspect", made / "one.pt"), as_json("inspect", made / "checkpoint")
    for key in ("ratio", "model_ratio", "parameters", "dense_parameters", "sublayers"):
        assert one[key] == folder[key]
    assert one["provenance"] == folder["provenance"]
    assert one["bytes"] == (made / "one.pt").stat().st_size


def test_a_plan_and_a_calibration(made: Path) -> None:
    plan, folder = as_json("inspect", made / "plan.json"), as_json("inspect", made / "checkpoint")
    for key in ("ratio", "parameters", "dense_parameters"):
        assert plan[key] == folder[key]
    calibration = as_json("inspect", made / "calibration")
    files = (made / "calibration").glob("block-*.safetensors")
    assert calibration["bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("arch", ["llama_untied", "qwen3", "opt", "gemma2", "phi3"])
def test_dense_models(arch: str, tiny_model: MakeModel) -> None:
    document = as_json("inspect", tiny_model(arch))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch))
    assert document["kind"] == "model"
    assert document["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert document["ratio"] == document["model_ratio"] == 1


def test_what_a_person_sees(made: Path) -> None:
    shown = succeed("inspect", made / "checkpoint", env={"COLUMNS": "80"}).stdout
    assert "No problems found." in shown
    assert "4 × 32 tokens of" in shown
    assert "(100: dense)" in shown
    ranks = succeed("inspect", made / "checkpoint", "-v", env={"COLUMNS": "80"}).stdout
    for text, there in ((shown, False), (ranks, True)):
        assert any(line.split()[:1] == ["full"] for line in text.splitlines()) is there
    assert succeed("inspect", made / "checkpoint", "-q").stdout == "checkpoint: no problems\n"


def test_a_missing_tensor(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop(f"{UP}.weight_u"))
    assert problems_of(checkpoint) == [f"{UP}.weight_u: missing."]
    assert "1 problem:" in hisvd("inspect", checkpoint).stdout
    assert hisvd("inspect", checkpoint, "-q").stdout == "checkpoint: 1 problem\n"


def test_an_extra_tensor(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update(stray=torch.ones(2)))
    assert problems_of(checkpoint) == ["stray: not part of the model."]


def test_values_that_are_no_numbers(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors[f"{UP}.weight"].fill_(float("nan")))
    (problem,) = problems_of(checkpoint)
    assert problem.startswith(f"{UP}.weight in model.safetensors contains")
    assert problems_of(checkpoint, "--no-check-values") == []


def test_an_order_of_rows_that_is_none(checkpoint: Path, tmp_path: Path) -> None:
    name = f"{UP}.weight_order"
    if name not in load_file(checkpoint / "model.safetensors"):
        pytest.skip("plain pairs have no order")
    rewrite(checkpoint, lambda tensors: tensors[name].fill_(2))
    assert problems_of(checkpoint) == [f"{name}: not a permutation of rows."]
    message, _ = fail("convert", checkpoint, "--to", "dense", "--output", tmp_path / "dense")
    assert name in message
    assert not (tmp_path / "dense").exists()


def test_a_rank_that_disagrees_with_the_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    rank = config["quantization_config"]["ranks"][UP]
    config["quantization_config"]["ranks"][UP] = rank + 1
    config["quantization_config"]["ranks"]["model.layers.9.mlp.up_proj"] = 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    pivoted = "storage" in config["quantization_config"]
    rows = (48 - rank, 48 - rank - 1) if pivoted else (48, 48)
    assert problems_of(checkpoint) == [
        "model.layers.9.mlp.up_proj: has a rank in config.json, but is not a linear layer of the "
        "model.",
        f"{UP}.weight: [{rank}, 32] on disk, [{rank + 1}, 32] expected by config.json.",
        f"{UP}.weight_u: [{rows[0]}, {rank}] on disk, [{rows[1]}, {rank + 1}] expected by "
        "config.json.",
        f"{UP}: rank {rank + 1}, but the plan has rank {rank}.",
    ]


def test_a_rank_that_the_config_forgot(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    rank = config["quantization_config"]["ranks"].pop(UP)
    (checkpoint / "config.json").write_text(json.dumps(config))
    pivoted = "storage" in config["quantization_config"]
    found = problems_of(checkpoint)
    order = f"{UP}.weight_order: not part of the model."
    assert (order in found) == pivoted
    assert [problem for problem in found if problem != order] == [
        f"{UP}.weight_u: not part of the model.",
        f"{UP}.weight: [{rank}, 32] on disk, [48, 32] expected by config.json.",
        f"{UP}: rank 32, but the plan has rank {rank}.",
    ]


def test_a_plan_that_disagrees(checkpoint: Path) -> None:
    plan = json.loads((checkpoint / "plan.json").read_text())
    rows = [row for row in plan["sublayers"] if row["name"] != UP]
    row = next(row for row in plan["sublayers"] if row["name"] == UP)
    rows.append({**row, "name": "model.layers.9.mlp.up_proj"})
    (checkpoint / "plan.json").write_text(json.dumps({**plan, "sublayers": rows}))
    assert problems_of(checkpoint) == [
        f"model.layers.9.mlp.up_proj: missing, but the plan has rank {row['rank']}.",
    ]


def test_a_plan_that_disagrees_with_itself(checkpoint: Path) -> None:
    plan = json.loads((checkpoint / "plan.json").read_text())
    plan["kept_parameters"] += 1
    (checkpoint / "plan.json").write_text(json.dumps(plan))
    (problem,) = problems_of(checkpoint)
    kept = plan["kept_parameters"]
    assert f"kept_parameters is {kept}, but the ranks require {kept - 1}." in problem


def test_records_that_are_missing(checkpoint: Path) -> None:
    (checkpoint / "plan.json").unlink()
    (checkpoint / "hisvd.json").unlink()
    assert problems_of(checkpoint) == [
        "plan.json is missing: ranks cannot be checked against the plan.",
        "hisvd.json is missing or empty: the provenance is unknown.",
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), 5),
        (("model", "name"), None),
        (("calibration",), []),
        (("calibration", "data", "samples"), "4"),
        (("settings",), 7),
        (("files", "README.md"), 5),
        (("ratio",), "0.6"),
        (("update",), 3),
    ],
)
def test_a_record_of_wrong_types(
    path: tuple[str, ...], value: object, made: Path, here: Path
) -> None:
    shutil.copytree(made / "checkpoint", here / "ck")
    record = node = json.loads((here / "ck" / "hisvd.json").read_text())
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (here / "ck" / "hisvd.json").write_text(json.dumps(record))
    (problem,) = problems_of(here / "ck")
    assert f"hisvd.json is damaged: {'.'.join(path)}: " in problem
    convert = ("convert", "ck", "--output", "out")
    evaluation = ("eval", "ck", "--dataset", text_file(here, 300), "--seqlen", 32, "--update-card")
    for words in ((*convert, "--to", "dense"), (*convert, "--quantize", "int8"), evaluation):
        assert f"{'.'.join(path)}: " in untouched(here, *words)[0]
    document = torch.load(made / "one.pt", weights_only=True)
    torch.save({**document, "provenance": record}, here / "one.pt")
    (problem,) = problems_of(here / "one.pt")
    assert f"{'.'.join(path)}: " in problem
    assert (
        f"{'.'.join(path)}: "
        in untouched(here, "convert", "one.pt", "--to", "hf", "--output", "out")[0]
    )


def test_a_record_of_an_earlier_version(made: Path, here: Path) -> None:
    """Without the entries that were added later, and with one that nobody knows."""
    shutil.copytree(made / "checkpoint", here / "ck")
    record = json.loads((here / "ck" / "hisvd.json").read_text())
    for key in ("gradients", "files", "allocator", "budget_parameters"):
        del record[key]
    del record["model"]["parameters"], record["model"]["revision"]
    (here / "ck" / "hisvd.json").write_text(json.dumps({**record, "added": [1]}))
    assert problems_of(here / "ck") == []
    succeed("convert", "ck", "--to", "dense", "--output", "dense")
    succeed("convert", "ck", "--quantize", "int8", "--output", "int8")


@pytest.mark.parametrize("record", ["[]", "3", "{}"])
def test_a_record_that_is_none(record: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "hisvd.json").write_text(record)
    assert problems_of(checkpoint) == ["hisvd.json is missing or empty: the provenance is unknown."]
    other = text_file(tmp_path, 300, seed=7)
    succeed("eval", checkpoint, "--dataset", other, "--seqlen", 32)


def test_surplus_tensors_of_one_file_are_named_as_those_of_a_folder(
    made: Path, checkpoint: Path, tmp_path: Path
) -> None:
    more = {"stray": torch.ones(3), "model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}
    path = checkpoint / "model.safetensors"
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    document = torch.load(made / "one.pt", weights_only=True)
    document["tensors"] |= more
    torch.save(document, tmp_path / "one.pt")
    expected = sorted(f"{name}: not part of the model." for name in more)
    assert sorted(problems_of(checkpoint)) == expected
    assert sorted(problems_of(tmp_path / "one.pt")) == expected


def test_one_file_of_a_model_that_cannot_be_built(made: Path, tmp_path: Path) -> None:
    document = torch.load(made / "one.pt", weights_only=True)
    document["config"]["model_type"] = "nosuch"
    torch.save(document, tmp_path / "one.pt")
    (problem,) = problems_of(tmp_path / "one.pt")
    assert "transformers cannot read the config" in problem


def test_a_config_without_ranks(checkpoint: Path) -> None:
    for ranks in (None, [1], {UP: "many"}, {UP: 0}):
        quantization = {"quant_method": "hisvd", "format_version": 1, "ranks": ranks}
        edit_json(checkpoint / "config.json", quantization_config=quantization)
        message, _ = fail("inspect", checkpoint)
        assert "ranks" in message


def test_a_truncated_file(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message, _ = fail("inspect", checkpoint)
    assert str(path) in message
    cut = tmp_path / "cut.pt"
    cut.write_bytes((made / "one.pt").read_bytes()[:-200])
    message, _ = fail("inspect", cut)
    assert str(cut) in message


def test_a_damaged_calibration(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    shutil.copytree(made / "calibration", folder)
    (folder / "block-00001.safetensors").unlink()
    path = folder / "block-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    first, second = problems_of(folder)
    assert first == "Block 1 is missing."
    assert str(path) in second
    (folder / "calibration.json").write_text("{}")
    fail("inspect", folder)


def edit_pt(source: Path, target: Path, change: Callable[[Any], object]) -> Path:
    document = torch.load(source, weights_only=True)
    change(document)
    torch.save(document, target)
    return target


def test_a_pt_whose_parts_disagree(made: Path, tmp_path: Path) -> None:
    def shrink(document: Any) -> None:
        document["tensors"][f"{UP}.weight"] = document["tensors"][f"{UP}.weight"][1:].clone()

    def spoil(document: Any) -> None:
        document["tensors"][f"{UP}.weight"][0] = float("inf")

    path = edit_pt(made / "one.pt", tmp_path / "a.pt", shrink)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{UP}.weight: [")
    path = edit_pt(made / "one.pt", tmp_path / "b.pt", spoil)
    assert problems_of(path) == [f"{UP}.weight: contains NaN or infinite values."]
    assert problems_of(path, "--no-check-values") == []


@pytest.mark.parametrize("part", ["config", "tensors", "files", "provenance"])
@pytest.mark.parametrize("value", [None, {}, 3])
def test_a_pt_that_lacks_a_part(part: str, value: object, made: Path, tmp_path: Path) -> None:
    path = edit_pt(made / "one.pt", tmp_path / "a.pt", lambda d: d.update({part: value}))
    result = hisvd("inspect", path)
    assert "Internal error" not in result.stderr
    if (part, value) != ("provenance", {}):
        assert result.exit_code == 1


# Other tools' files: pickled modules whose classes exist only while they are saved.


def low_rank_names(style: str) -> tuple[str, str]:
    return {"svd-llm": ("q_u_proj", "q_v_proj"), "nested": ("ALinear", "BLinear")}[style]


@pytest.fixture
def foreign_class() -> Iterator[type[nn.Module]]:
    """A class that is gone, with its module, before the file is inspected."""
    module = types.ModuleType("component_of_another_tool")
    made = type("SVD_Layer", (nn.Module,), {"__module__": module.__name__})
    module.SVD_Layer = made  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield made
    sys.modules.pop(module.__name__, None)


def foreign_model(cls: type[nn.Module], style: str) -> nn.Module:
    u, v = low_rank_names(style)
    layers = nn.ModuleList()
    for rank in (3, 4):
        attention = cls()
        pair = {u: nn.Linear(rank, 24, bias=False), v: nn.Linear(16, rank, bias=False)}
        if style == "nested":
            inner = cls()
            for name, module in pair.items():
                inner.add_module(name, module)
            pair = {"q_proj": inner}  # type: ignore[dict-item]
        for name, module in pair.items():
            attention.add_module(name, module)
        attention.add_module("o_proj", nn.Linear(16, 16, bias=False))
        layer = cls()
        layer.add_module("self_attn", attention)
        layers.append(layer)
    model = cls()
    model.add_module("layers", layers)
    model.add_module("lm_head", nn.Linear(16, 50, bias=False))
    return model


@pytest.mark.parametrize("style", ["svd-llm", "nested"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_models_of_other_tools(
    style: str, wrapped: bool, foreign_class: type[nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "foreign.pt"
    model = foreign_model(foreign_class, style)
    total = sum(parameter.numel() for parameter in model.parameters())
    torch.save({"model": model, "tokenizer": None} if wrapped else model, path)
    del sys.modules[foreign_class.__module__]
    document = as_json("inspect", path)
    assert document["kind"] == "pt"
    rows = {row["name"].removeprefix("model."): row for row in document["sublayers"]}
    assert {name: (row["shape"], row["rank"], row["dense"]) for name, row in rows.items()} == {
        "layers.0.self_attn.q_proj": ([24, 16], 3, False),
        "layers.0.self_attn.o_proj": ([16, 16], 16, True),
        "layers.1.self_attn.q_proj": ([24, 16], 4, False),
        "layers.1.self_attn.o_proj": ([16, 16], 16, True),
    }
    assert document["parameters"] == total
    assert document["dense_parameters"] == total + 2 * 24 * 16 - 7 * 40
    assert document["bytes"] == path.stat().st_size
    assert f"{foreign_class.__module__}.SVD_Layer" in document["provenance"]["classes"]
    assert foreign_class.__module__ not in sys.modules
    shown = succeed("inspect", path, env={"COLUMNS": "80"}).stdout
    assert "not executed" in shown
    fail("eval", path)


def test_a_plain_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save({"layers.0.q_proj.weight": torch.ones(4, 6), "norm.weight": torch.ones(6)}, path)
    document = as_json("inspect", path)
    assert [row["name"] for row in document["sublayers"]] == ["layers.0.q_proj"]
    assert document["parameters"] == 30
