"""What is reused is what was asked for: keys of resumed work, calibrations, texts, weight files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hisvd_cli.calibration.text.self_text import sample_self
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.weights import INDEX, SINGLE, open_weights
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.settings import ALLOCATOR_NAMES, SECTIONS, decides
from hisvd_cli.utils.files.artifact import partial_path
from hisvd_cli.utils.progress import Silent
from tests.cli_helpers import as_json, digests, fail, script, succeed, text_file
from tests.conftest import CACHE, MakeModel
from tests.models import edit_json, load_dense, save_model
from tests.test_damaged_parts import Words, killed

COUNTS = ("--samples", 6, "--seqlen", 32)


@pytest.fixture
def text(tmp_path: Path) -> Words:
    return ("--dataset", text_file(tmp_path), *COUNTS)


@pytest.fixture
def checkpoint(tiny_model: MakeModel, text: Words, here: Path) -> Path:
    succeed("compress", "--model", tiny_model("llama"), *text, "--ratio", 0.5, "--output", "ck")
    return here / "ck"


def calibrations(folder: Path) -> list[Path]:
    return sorted((folder / CACHE / "calibration").glob("*/*/calibration.json"))


@pytest.mark.parametrize("to", ["dense", "hf"])
def test_3_convert_does_not_resume_what_was_made_of_other_weights(
    to: str, checkpoint: Path, here: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, here / "other"))
    tensors = load_file(other / SINGLE)
    save_file({name: 2 * t for name, t in tensors.items()}, other / SINGLE, {"format": "pt"})
    form = ("--to", to, "--max-shard-size", 0.00002)
    succeed("convert", "other", *form, "--output", "wanted")
    killed(("convert", checkpoint, *form, "--output", "made"), "model-*", 3, here)
    succeed("convert", "other", *form, "--output", "made")
    assert digests(here / "made") == digests(here / "wanted")


@pytest.mark.parametrize("to", ["dense", "hf"])
def test_3_convert_leaves_no_shard_and_no_index_of_another_size(
    to: str, checkpoint: Path, here: Path
) -> None:
    killed(
        ("convert", checkpoint, "--to", to, "--max-shard-size", 0.00002, "--output", "made"),
        "model-*",
        3,
        here,
    )
    succeed("convert", checkpoint, "--to", to, "--output", "made")
    assert [path.name for path in sorted((here / "made").glob("model*.safe*"))] == [SINGLE]
    succeed("convert", checkpoint, "--to", to, "--output", "wanted")
    assert digests(here / "made") == digests(here / "wanted")


def test_3_a_finished_folder_holds_no_weights_that_its_index_does_not_list(
    checkpoint: Path, here: Path
) -> None:
    words = ("convert", checkpoint, "--to", "dense", "--max-shard-size", 0.00002)
    killed((*words, "--output", "made"), "model-*", 2, here)
    partial = partial_path(here / "made")
    shutil.copy(checkpoint / SINGLE, partial / SINGLE)
    shutil.copy(checkpoint / SINGLE, partial / "model-00001-of-00002.safetensors")
    succeed(*words, "--output", "made")
    index = json.loads((here / "made" / INDEX).read_text())
    listed = set(index["weight_map"].values())
    assert {path.name for path in (here / "made").glob("*.safetensors")} == listed


def test_3_a_pt_file_with_other_weights_is_not_resumed(checkpoint: Path, here: Path) -> None:
    """The time of a file can be set back."""
    succeed("convert", checkpoint, "--to", "pt", "--output", "x.pt")
    form = ("--to", "hf", "--max-shard-size", 0.00002, "--output", "made")
    killed(("convert", "x.pt", *form), "model-*", 3, here)
    time = (here / "x.pt").stat().st_mtime_ns
    document = torch.load(here / "x.pt", weights_only=True)
    document["tensors"] = {name: 2 * t for name, t in document["tensors"].items()}
    torch.save(document, here / "x.pt")
    os.utime(here / "x.pt", ns=(time, time))
    succeed("convert", "x.pt", *form)
    made = open_weights(here / "made")
    assert all(torch.equal(made.read(name), t) for name, t in document["tensors"].items())


def test_3_a_recovery_is_not_resumed_into_shards_of_another_size(
    checkpoint: Path, here: Path
) -> None:
    training = ("--recover", "distill", "--recover-tokens", 300, "--recover-seqlen", 16)
    words = ("compress", "--from", checkpoint, *training, "--output", "made")
    killed((*words, "--max-shard-size", 0.00002), "model-*", 2, here)
    succeed(*words)
    assert [path.name for path in sorted((here / "made").glob("model*.safe*"))] == [SINGLE]


def test_3_work_of_other_versions_is_not_resumed(
    checkpoint: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("convert", checkpoint, "--to", "dense", "--max-shard-size", 0.00002)
    killed((*words, "--output", "made"), "model-*", 2, here)
    first = next(partial_path(here / "made").glob("model-00001*"))
    before = first.stat().st_ino, first.stat().st_mtime_ns
    monkeypatch.setattr("hisvd_cli.utils.files.artifact.versions", lambda: {"torch": "other"})
    succeed(*words, "--output", "made")
    stat = (here / "made" / first.name).stat()
    assert (stat.st_ino, stat.st_mtime_ns) != before


def test_3_of_two_layouts_hisvd_reads_the_file_that_transformers_reads(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    state = load_file(folder / SINGLE)
    name = "model.norm.weight"
    save_file({n: 3 * t for n, t in state.items()}, folder / "shard.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, "shard.safetensors")})
    )
    torch.save({n: 5 * t for n, t in state.items()}, folder / "pytorch_model.bin")
    for expected in (1, 3, 5):
        found = dict(load_dense(folder).named_parameters())[name]
        assert torch.equal(found, expected * state[name])
        assert torch.equal(open_weights(folder).read(name), found)
        for gone in {1: [SINGLE], 3: [INDEX, "shard.safetensors"], 5: []}[expected]:
            (folder / gone).unlink()


def test_3_settings_say_themselves_which_choose_a_calibration() -> None:
    chosen = {key for key in SECTIONS["calibration"].model_fields if decides("calibration", key)}
    assert chosen == {"dataset", "drop", "samples", "seqlen", "seed"}
    assert set(resolve({}, environ={}).recorded("calibration")["calibration"]) == chosen


@pytest.mark.parametrize(
    "more",
    [{"HISVD_CALIBRATION_BATCH": "2"}, {"HISVD_CALIBRATION_GRADIENTS": "false"}],
    ids=["batch", "gradients"],
)
def test_3_how_a_calibration_is_taken_loses_no_reuse(
    more: dict[str, str], text: Words, tiny_model: MakeModel, here: Path
) -> None:
    model = ("--model", tiny_model("llama"))
    succeed("calibrate", *model, *text)
    made = calibrations(here.parent)
    succeed("compress", *model, "--ratio", 0.5, "--output", "made", env=more)
    assert calibrations(here.parent) == made
    record = json.loads((here / "made" / "hisvd.json").read_text())
    assert record["calibration"]["key"] == json.loads(made[0].read_text())["key"]


GPTQ = ("--quantize", "int4", "--quantize-method", "gptq")


def quantized_text(folder: Path) -> Any:
    return json.loads((folder / "hisvd.json").read_text())["quantization"]["text"]


def test_3_gptq_with_a_batch_runs_on_the_text_of_the_calibration(
    checkpoint: Path, text: Words, here: Path
) -> None:
    succeed("convert", checkpoint, *GPTQ, "--output", "one")
    succeed("convert", checkpoint, *GPTQ, "--batch", 3, "--output", "two")
    named = {"HISVD_CALIBRATION_BATCH": "3"}
    succeed("convert", checkpoint, *GPTQ, "--output", "three", env=named)
    succeed("convert", checkpoint, *GPTQ, "--samples", 4, "--output", "four")
    one, two, three, four = (
        quantized_text(here / name) for name in ("one", "two", "three", "four")
    )
    assert one == two == three
    assert one["dataset"] == str(text[1]) == four["dataset"]
    assert four["samples"] == 4


def test_3_a_profile_that_names_another_text_beside_a_calibration_is_refused(
    text: Words, tiny_model: MakeModel, tmp_path: Path, here: Path
) -> None:
    model = ("--model", tiny_model("llama"))
    succeed("calibrate", *model, *text, "--calibration", "made")
    profile = here / "hisvd.toml"
    other = text_file(tmp_path, seed=1)
    plan = ("plan", *model, "--ratio", 0.5)
    profile.write_text(f'[calibration]\npath = "made"\ndataset = "{other}"\n')
    message, hint = fail(*plan)
    assert message == f"made was calibrated with --dataset {text[1]}, not {other}."
    assert hint.startswith(f"Leave out calibration.dataset in {profile}, or name another folder")
    profile.write_text('[calibration]\npath = "made"\nsamples = 7\n')
    assert "with --samples 6, not 7." in fail(*plan)[0]
    profile.write_text('[calibration]\npath = "made"\n')
    message, hint = fail(*plan, env={"HISVD_CALIBRATION_SEED": "3"})
    assert "with --seed 0, not 3." in message
    assert "Leave out HISVD_CALIBRATION_SEED" in hint
    profile.write_text(f'[calibration]\npath = "made"\nsamples = 6\ndataset = "{text[1]}"\n')
    succeed(*plan)
    profile.write_text('[calibration]\npath = "made"\ndataset = "auto"\n')
    succeed(*plan)


def test_5_a_named_calibration_of_a_text_that_changed_since_is_refused(
    text: Words, tiny_model: MakeModel, tmp_path: Path
) -> None:
    words = ("--model", tiny_model("llama"), *text, "--calibration", tmp_path / "made")
    succeed("calibrate", *words)
    succeed("plan", *words, "--ratio", 0.5)
    text_file(tmp_path, seed=1).rename(str(text[1]))
    message = fail("plan", *words, "--ratio", 0.5)[0]
    assert message.endswith(f"with --dataset {text[1]}, not {text[1]} as it is now.")


def test_5_a_grid_whose_text_changed_under_its_name_keeps_no_cell(
    text: Words, tiny_model: MakeModel, tmp_path: Path, here: Path
) -> None:
    grid = ("compress", "--model", tiny_model("llama"), *text, "--ratio", 0.8, "--ratio", 0.5)
    succeed(*grid)
    assert {cell["status"] for cell in as_json(*grid)["cells"]} == {"kept"}
    before = digests(here)
    text_file(tmp_path, seed=1).rename(str(text[1]))
    message, hint = fail(*grid)
    assert message == f"llama-0.8 was made with other settings: the text of {text[1]}."
    assert hint.startswith("Pass --overwrite")
    assert digests(here) == before


def test_5_a_grid_whose_text_of_the_recovery_changed_keeps_no_cell(
    text: Words, tiny_model: MakeModel, tmp_path: Path, here: Path
) -> None:
    trained = text_file(tmp_path, seed=2)
    grid = ("compress", "--model", tiny_model("llama"), *text, "--ratio", 0.8, "--ratio", 0.5)
    grid = (*grid, "--recover", "distill", "--recover-tokens", 100, "--recover-seqlen", 16)
    grid = (*grid, "--recover-dataset", trained)
    succeed(*grid)
    assert {cell["status"] for cell in as_json(*grid)["cells"]} == {"kept"}
    text_file(tmp_path, seed=1).rename(trained)
    assert "other settings: the training text." in fail(*grid)[0]
    assert here.is_dir()


@pytest.mark.parametrize(
    ("pattern", "count"), [(("--include", "*.1.*"), 7), (("--exclude", "q_proj"), 18)]
)
def test_3_every_allocator_takes_include_and_exclude(
    pattern: tuple[str, str], count: int, text: Words, tiny_model: MakeModel
) -> None:
    model = ("--model", tiny_model("llama"), *text)
    succeed("calibrate", *model, "--weight-gradients")
    quick = ("--probe-samples", 1, "--learning-steps", 2, "--sensitivity-ratios", 0.5)
    allocators = [word for name in ALLOCATOR_NAMES for word in ("--allocator", name)]
    plans = as_json("plan", *model, *quick, "--ratio", 0.5, *pattern, *allocators)["plans"]
    assert [plan["allocator"] for plan in plans] == list(ALLOCATOR_NAMES)
    for plan in plans:
        assert len(plan["sublayers"]) == count
        assert plan["kept_parameters"] <= plan["budget_parameters"]


MORE: list[Words] = [(), ("--stages", 2), ("--quantize", "int8"), ("--update", "closed-form")]


@pytest.mark.parametrize("method", ["distill", "lora"])
def test_3_ratio_1_leaves_nothing_to_train_and_says_so_before_the_work(
    method: str, text: Words, tiny_model: MakeModel, here: Path
) -> None:
    for more in MORE:
        words = ("compress", "--model", tiny_model("llama"), *text, "--ratio", 1, *more)
        message, hint = fail(*words, "--recover", method, code=2)
        assert message.startswith(f"--recover {method} trains low-rank layers, but at this ratio")
        assert hint == "Lower --ratio, or leave out --recover."
    assert not calibrations(here.parent)
    assert not list(here.iterdir())


@pytest.mark.parametrize("more", MORE, ids=str)
def test_3_ratio_1_goes_with_everything_else(
    more: Words, text: Words, tiny_model: MakeModel, here: Path
) -> None:
    words = ("compress", "--model", tiny_model("llama"), *text, "--ratio", 1, *more)
    succeed(*words, "--output", "made")
    assert "low-rank" in fail("compress", "--from", "made", "--recover", "distill", code=2)[0]
    assert [path.name for path in here.iterdir()] == ["made"]


def test_3_a_ratio_that_leaves_every_layer_whole_is_found_after_planning(
    text: Words, tiny_model: MakeModel, here: Path
) -> None:
    words = ("compress", "--model", tiny_model("llama"), *text)
    succeed(*words, "--ratio", 1, "--output", "whole")
    message, _ = fail(*words, "--plan", "whole/plan.json", "--recover", "distill", code=2)
    assert "every layer stays dense" in message
    assert [path.name for path in here.iterdir()] == ["whole"]


def drawn(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return text that a model writes."""
    where = torch.device(device)
    source = open_source(str(folder))
    return sample_self(source, 5, 9, 0, device=where, dtype=dtype, reporter=Silent())


def test_3_text_that_the_model_writes_is_found_on_another_device(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    first = drawn(folder)
    monkeypatch.setattr("hisvd_cli.calibration.text.self_text.load_source", None)
    assert torch.equal(drawn(folder, "meta"), first)
    with pytest.raises(TypeError):  # it is drawn anew, as it would be another text
        drawn(folder, dtype=torch.float64)


def test_3_text_that_the_model_writes_depends_on_how_texts_begin(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    assert set(drawn(folder)[:, 0].tolist()) == {0}
    edit_json(folder / "tokenizer_config.json", bos_token="a", eos_token="a")
    begins = open_source(str(folder)).tokenizer.bos_token_id
    assert begins != 0
    assert set(drawn(folder)[:, 0].tolist()) == {begins}


def test_3_a_text_named_from_another_folder_is_found_again(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    name = text_file(one).name
    model = ("--model", tiny_model("llama"))
    monkeypatch.chdir(one)
    succeed("calibrate", *model, "--dataset", name, *COUNTS, "--calibration", two / "made")
    monkeypatch.chdir(two)
    named = ("--calibration", "made", "--ratio", 0.5)
    recover = ("--recover", "distill", "--recover-tokens", 100, "--recover-seqlen", 16)
    succeed("compress", *model, *named, "--weight-gradients", *recover, "--output", "ck")
    succeed("convert", "ck", *GPTQ, "--output", "int4")
    assert quantized_text(two / "int4")["dataset"] == name
    text_file(two, seed=0).write_text("another text of that name " * 300)
    succeed("convert", "ck", *GPTQ, "--output", "again")
    assert digests(two / "again") == digests(two / "int4")
    for path in (two / "ck").glob("*.json"):
        assert str(one) not in path.read_text(), "a path of this machine would be published"


def test_3_a_recovery_takes_no_other_text_of_the_same_name(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for seed, folder in enumerate((one, two)):
        folder.mkdir()
        text_file(folder, seed=seed).rename(folder / "t.txt")
    monkeypatch.chdir(one)
    made = ("--dataset", "t.txt", *COUNTS, "--ratio", 0.5, "--output", "ck", "--no-evaluate")
    succeed("compress", "--model", tiny_model("llama"), *made)
    shutil.copy(two / "t.txt", one / "t.txt")  # now it reads otherwise everywhere
    recover = ("--recover", "distill", "--recover-tokens", 100, "--recover-seqlen", 16)
    for folder in (one, two, tmp_path):  # with another text of that name, and with none
        monkeypatch.chdir(folder)
        words = ("compress", "--from", one / "ck", *recover, "--output", "out")
        message, hint = fail(*words)
        assert "'t.txt'" in message
        assert "calibrated on" in message
        assert "--recover-dataset" in hint
        assert not (folder / "out").exists()
    succeed(*words, "--recover-dataset", two / "t.txt")


def test_3_manifests_of_texts_that_are_not_known_here_still_work(
    text: Words, tiny_model: MakeModel, tmp_path: Path
) -> None:
    words = ("--model", tiny_model("llama"), "--calibration", tmp_path / "made")
    succeed("calibrate", *words, *text)
    shutil.rmtree(tmp_path / CACHE / "texts")
    succeed("calibrate", *words, "--weight-gradients", *text)
    Path(str(text[1])).unlink()
    message = fail("compress", *words, "--ratio", 0.5, "--update", "propagated")[0]
    assert message == f"There is no file '{text[1]}'."


def test_4_a_pt_file_is_the_same_in_every_run(checkpoint: Path, here: Path) -> None:
    succeed("convert", checkpoint, "--to", "pt", "--output", "one.pt")
    done = script("convert", checkpoint, "--to", "pt", "--output", "two.pt", cwd=here)
    assert done.returncode == 0, done.stderr
    assert (here / "one.pt").read_bytes() == (here / "two.pt").read_bytes()
    assert torch.load(here / "two.pt", weights_only=True, mmap=True)["format"] == "hisvd-pt"


def test_3_a_checkpoint_left_before_its_training_is_not_that_of_another_calibration(
    tiny_model: MakeModel, text: Words, tmp_path: Path, here: Path
) -> None:
    """A given plan says nothing of the calibration that layers are factored by."""
    model = ("--model", tiny_model("llama"))
    succeed("compress", *model, *text, "--ratio", 0.5, "--output", "first")
    recover = ("--recover", "distill", "--recover-tokens", 300, "--recover-seqlen", 16)
    words = ("compress", *model, *text, "--plan", "first/plan.json", *recover, "--output")
    killed((*words, "made"), "best.safetensors", 1, here)
    assert (here / ".made.hisvd.work" / "untrained").is_dir()
    text_file(tmp_path, seed=1).rename(str(text[1]))
    succeed(*words, "made")
    succeed(*words, "wanted")
    assert (here / "made" / SINGLE).read_bytes() == (here / "wanted" / SINGLE).read_bytes()
