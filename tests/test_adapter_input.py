"""A LoRA adapter beside the weights, or alone in a folder: merged as PEFT merges it, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import UnsupportedModelError
from tests.cli_helpers import fail, perplexity, succeed, text_file
from tests.conftest import MakeModel
from tests.models import edit_json, load_dense
from tests.packing import block_float8, pack

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "o_proj"],
        "rank_pattern": {"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
        "alpha_pattern": {"o_proj": 5, r"layers\.\d+\.mlp\.up_proj": 1},
    },
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "whole tensors": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
}


def add_adapter(model: Path, folder: Path, **knobs: Any) -> None:
    """Write an adapter with random numbers for a model."""
    torch.manual_seed(0)
    wrapped = get_peft_model(load_dense(model), LoraConfig(r=4, lora_alpha=12, **knobs))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name or name.endswith("bias"):
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(str(folder))


def both(model: Path, parent: Path, **knobs: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a folder with a model and an adapter, and the tensors that PEFT merges them to."""
    folder = parent / "adapted"
    shutil.copytree(model, folder)
    add_adapter(model, folder, **knobs)
    wrapped: Any = PeftModel.from_pretrained(load_dense(model), str(folder))
    return folder, dict(wrapped.merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_beside_the_weights_is_merged_as_peft_does(
    kind: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    arch = "qwen2" if kind == "biases" else "llama_untied"
    folder, expected = both(tiny_model(arch), tmp_path, **KINDS[kind])
    weights = open_source(str(folder)).weights
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights.read(name), tensor, rtol=1e-5, atol=1e-6)


def test_fan_in_fan_out_turns_the_product_round(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["up_proj"])
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    turned = {f"{name}.lora_A.weight": b.T.contiguous(), f"{name}.lora_B.weight": a.T.contiguous()}
    save_file(turned, path)
    edit_json(folder / "adapter_config.json", fan_in_fan_out=True)
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    made = open_source(str(folder)).weights.read("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(made, stored + 3 * (b @ a))


def test_whole_and_streamed_evaluation_both_apply_the_adapter(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    base, text = tiny_model("llama_untied"), text_file(tmp_path, 200)
    folder, expected = both(base, tmp_path, target_modules=["q_proj", "down_proj"])
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    save_file(expected, plain / "model.safetensors", {"format": "pt"})
    merged = perplexity(plain, text, "off")
    assert perplexity(base, text, "on") != pytest.approx(merged, rel=1e-3)
    for stream in ("on", "off"):
        assert perplexity(folder, text, stream) == pytest.approx(merged, rel=1e-5)


def test_the_evaluation_store_keeps_a_model_and_its_adapted_copy_apart(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama_untied"), folder)
    text = text_file(tmp_path, 200)
    found = [perplexity(folder, text, "on")]
    for rank in (2, 4):
        add_adapter(tiny_model("llama_untied"), folder, target_modules=["v_proj"], rank_pattern={})
        edit_json(folder / "adapter_config.json", lora_alpha=rank)
        found.append(perplexity(folder, text, "on"))
    assert len({round(each, 6) for each in found}) == 3


def test_a_folder_that_holds_only_an_adapter(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, text = tiny_model("llama_untied"), text_file(tmp_path, 400)
    folder, expected = both(base, tmp_path, target_modules=["q_proj"])
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folder / name, alone / name)
    shutil.copytree(base, tmp_path / "base")
    edit_json(alone / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    source = open_source("alone")
    assert source.name == "alone"
    assert source.fingerprint != open_source("base").fingerprint
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(source.weights.read(name), expected[name], rtol=1e-5, atol=1e-6)
    assert perplexity(alone, text, "on") == pytest.approx(perplexity(folder, text, "off"))
    shutil.copyfile(base / "config.json", alone / "config.json")  # as some trainers do
    assert open_source("alone").weights.read(name).equal(source.weights.read(name))


def test_a_checkpoint_of_an_adapted_model_holds_the_merged_weights(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    text = text_file(tmp_path, 400)
    folder, expected = both(
        tiny_model("llama_untied"), tmp_path, target_modules=["q_proj", "lm_head"]
    )
    made, dense = tmp_path / "made", tmp_path / "dense"
    options = ("--ratio", 0.9, "--dataset", text, "--samples", 4, "--seqlen", 32)
    done = succeed(
        "compress", "--model", folder, *options, "--exclude", "q_proj", "-o", made, "--no-evaluate"
    )
    assert "Warning: The adapter in" in done.stderr
    assert "is merged into 4 tensors." in done.stderr
    assert not list(made.glob("adapter*"))
    succeed("convert", made, "--to", "dense", "-o", dense)
    tensors = load_file(dense / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_quantized_model(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    added = open_source(str(folder)).weights.read(name)
    added -= load_file(folder / "model.safetensors")[name]
    plain = pack(folder, block_float8, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    made = open_source(str(folder)).weights.read(name)
    torch.testing.assert_close(made, plain[name] + added, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "uses use_dora"),
    "bias": ({"lora_bias": True}, "uses lora_bias"),
    "type": ({"peft_type": "IA3"}, "has the type IA3"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", ["eval", "inspect", "compress"])
def test_an_adapter_that_cannot_be_merged(
    case: str, command: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    changes, words = REFUSED[case]
    edit_json(folder / "adapter_config.json", **changes)
    named = ("compress", "--model") if command == "compress" else (command,)
    message, hint = fail(*named, folder)
    assert words in message
    assert "merge_and_unload" in hint


def test_an_adapter_with_more_than_low_rank_additions(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens"
    pair = load_file(path)
    for more, words in (
        (f"{name}.lora_embedding_A", f"contains {name}.lora_embedding_A"),
        (f"{name}.weight", r"resizes model.embed_tokens.weight from \[300, 32\] to \[301, 32\]"),
    ):
        save_file({**pair, more: torch.ones(301, 32)}, path)
        with pytest.raises(UnsupportedModelError, match=words):
            open_source(str(folder)).weights  # noqa: B018


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model.model.model.layers.9.x": (4, 32)}, "changes model.layers.9.x"),
        ({"base_model.model.lm_head": (4, 31)}, "match a weight [300, 32]"),
    ],
)
def test_an_adapter_of_another_model(
    change: dict[str, tuple[int, int]], words: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    (name, shape) = next(iter(change.items()))
    pair = {f"{name}.lora_A.weight": torch.ones(shape), f"{name}.lora_B.weight": torch.ones(300, 4)}
    save_file(pair, folder / "adapter_model.safetensors")
    assert words in fail("eval", folder)[0]


def test_an_adapter_without_its_weights(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").unlink()
    message, hint = fail("eval", folder)
    assert "has adapter_config.json but no adapter_model.safetensors" in message
    assert "already merged" in hint


def test_an_adapter_that_names_itself_as_its_base(tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert "names itself as its base model" in fail("eval", folder)[0]


@pytest.mark.parametrize("content", ["[", "[1]", "{}"])
def test_a_damaged_adapter_config(content: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in fail("eval", folder)[0]


def test_an_adapter_on_a_compressed_checkpoint(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    said = {"quant_method": "hisvd", "format_version": 1, "ranks": {}}
    edit_json(folder / "config.json", quantization_config=said)
    for words in (("eval", folder), ("convert", folder, "--to", "pt", "-o", tmp_path / "x.pt")):
        assert "is a compressed checkpoint with a LoRA adapter" in fail(*words)[0]


@pytest.mark.parametrize(
    "said",
    [
        {"lora_alpha": 10**308},
        {"lora_alpha": "1e400"},
        {"alpha_pattern": {"(.+)+!": 8}},
        {"alpha_pattern": {".*" * 60 + "!": 8}},
        {"alpha_pattern": {"q_proj": 10**308}},
    ],
)
def test_5_a_scale_that_cannot_be_used_is_refused_soon(
    said: dict[str, Any], tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder, _ = both(tiny_model("llama_untied"), tmp_path, target_modules=["q_proj"])
    edit_json(folder / "adapter_config.json", **said)
    message, _ = fail("plan", "--model", folder)
    assert "alpha" in message


@pytest.mark.parametrize(
    "said",
    [
        {"r": "x"},
        {"r": 0},
        {"r": 2.5},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj(": 4}},
        {"alpha_pattern": {"v_proj[": 4}},
        {"alpha_pattern": ["q_proj"]},
    ],
)
def test_settings_that_peft_refuses(
    said: dict[str, Any], tiny_model: MakeModel, tmp_path: Path
) -> None:
    base = tiny_model("llama_untied")
    folder, _ = both(base, tmp_path, target_modules=["q_proj"])
    edit_json(folder / "adapter_config.json", **said)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of many types
        PeftModel.from_pretrained(load_dense(base), str(folder))
    message, _ = fail("plan", "--model", folder)
    assert "adapter_config.json has the invalid" in message
