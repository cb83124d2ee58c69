"""Models that are quantized already: dequantized as they are read, or refused by name."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hisvd_cli.modeling.sources.dequantize import microscaled, scale_values, scaled, unpacked
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from tests.cli_helpers import as_json, fail, succeed, text_file
from tests.conftest import MakeModel
from tests.models import edit_json, save_tokenizer
from tests.packing import (
    Packer,
    bare_float8,
    block_float8,
    pack,
    packed_integers,
    row_float8,
    row_int8,
    whole_float8,
    words,
)

COMPRESSED = "compressed-tensors"


def groups(**weights: object) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
FORMATS: dict[str, tuple[Packer, dict[str, Any] | None]] = {
    "float8 blocks": (block_float8, FP8_BLOCKS),
    "float8 blocks that nothing names": (block_float8, None),
    "float8 rows": (
        row_float8,
        {"quant_method": COMPRESSED, "format": "float-quantized", "config_groups": groups()},
    ),
    "float8 of FBGEMM": (row_float8, {"quant_method": "fbgemm_fp8"}),
    "float8 whole": (whole_float8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "float8 whole that nothing names": (whole_float8, None),
    "bare float8": (bare_float8, None),
    "int8 rows": (
        row_int8,
        {"quant_method": COMPRESSED, "format": "int-quantized", "config_groups": groups()},
    ),
    "packed 4 bits": (
        packed_integers,
        {
            "quant_method": COMPRESSED,
            "format": "pack-quantized",
            "config_groups": groups(num_bits=4, group_size=16),
        },
    ),
    "packed 8 bits, reordered": (
        partial(packed_integers, bits=8, shuffled=True),
        {
            "quant_method": COMPRESSED,
            "format": "pack-quantized",
            "config_groups": groups(num_bits=8, group_size=16),
        },
    ),
    "packed 4 bits that nothing names": (packed_integers, None),
}


@pytest.fixture(params=FORMATS)
def packed(
    request: pytest.FixtureRequest, tiny_model: MakeModel, tmp_path: Path
) -> tuple[Path, dict[str, Tensor]]:
    """A quantized model, and the plain tensors that it stands for."""
    folder = tmp_path / "packed"
    shutil.copytree(tiny_model("llama_untied"), folder)
    packer, said = FORMATS[request.param]
    return folder, pack(folder, packer, said)


def plain_copy(folder: Path, plain: dict[str, Tensor]) -> Path:
    """Write the model in full precision beside the quantized one."""
    target = folder.with_name("plain")
    shutil.copytree(folder, target)
    save_file(plain, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def perplexity(folder: Path, text: Path, stream: str) -> float:
    options = ("--dataset", text, "--seqlen", 32, "--stream", stream)
    found: float = as_json("eval", folder, *options)["results"][0]["perplexity"]
    return found


def test_quantized_input_is_read_as_plain_weights(packed: tuple[Path, dict[str, Tensor]]) -> None:
    folder, plain = packed
    weights = open_source(str(folder)).weights
    assert set(weights) == set(plain)
    for name, expected in plain.items():
        assert weights.infos[name].shape == tuple(expected.shape)
        assert weights.infos[name].dtype == "float32"
        assert weights.infos[name].nbytes == expected.nbytes
        torch.testing.assert_close(weights.read(name), expected, rtol=1e-6, atol=1e-7)


def test_quantized_input_is_evaluated_whole_and_streamed_as_the_plain_model(
    packed: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, plain = packed
    text = text_file(tmp_path, 200)
    expected = perplexity(plain_copy(folder, plain), text, "off")
    assert perplexity(folder, text, "on") == pytest.approx(expected, rel=1e-5)
    assert perplexity(folder, text, "off") == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_of_quantized_input_says_nothing_of_the_quantization(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(tiny_model("llama_untied"), folder)
    plain = plain_copy(folder, pack(folder, block_float8, FP8_BLOCKS))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    text = text_file(tmp_path, 400)
    for source in (folder, plain):
        made = tmp_path / f"made-{source.name}"
        options = ("--ratio", 0.6, "--dataset", text, "--samples", 4, "--seqlen", 32)
        done = succeed("compress", "--model", source, *options, "-o", made)
        told = "are dequantized to float32" in done.stderr
        assert told == (source == folder)
        assert not (made / "hf_quant_config.json").exists()
        dense = tmp_path / f"dense-{source.name}"
        succeed("convert", made, "--to", "dense", "-o", dense)
        assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    said, expected = (
        json.loads((tmp_path / f"made-{name}" / "config.json").read_text())
        for name in ("packed", "plain")
    )
    assert said == expected
    ours, theirs = (
        load_file(tmp_path / f"dense-{name}" / "model.safetensors") for name in ("packed", "plain")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)


def test_inspect_shows_plain_weights_and_says_what_is_dequantized(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(tiny_model("llama_untied"), folder)
    pack(folder, block_float8, FP8_BLOCKS)
    done = succeed("inspect", folder, "--json")
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert {each["dtype"] for each in found["sublayers"]} == {"float32"}
    assert "21 weights" in done.stderr
    assert "(float8) are dequantized to float32" in " ".join(done.stderr.split())


def test_float8_blocks_are_what_transformers_makes_of_them() -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    made = getattr(module, "Fp8Dequantize", None)
    if made is None:
        pytest.skip("transformers 4 dequantizes only on a GPU")
    weight = torch.randn(48, 32)
    parts, values = block_float8("x", weight)
    stored, scale = parts["x.weight"], parts["x.weight_scale_inv"]
    theirs = made(None)._dequantize_one(stored, scale, torch.float32)
    ours = scaled(stored, scale, torch.float32, block=(16, 16))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, values)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(118, 136, (2, 6, 3), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(microscaled(blocks, scales, dtype), theirs)


def test_scales_may_be_exponents() -> None:
    exponents = torch.tensor([[0, 120], [127, 254]], dtype=torch.uint8)
    expected = torch.tensor([[2.0**-127, 2.0**-7], [1.0, 2.0**127]])
    assert torch.equal(scale_values(exponents), expected)
    if hasattr(torch, "float8_e8m0fnu"):
        assert torch.equal(scale_values(exponents.view(torch.float8_e8m0fnu)), expected)


def test_float8_blocks_that_are_cut_off_at_the_edge() -> None:
    parts, values = block_float8("x", torch.randn(40, 25))
    stored, scale = parts["x.weight"], parts["x.weight_scale_inv"]
    assert torch.equal(scaled(stored, scale, torch.float32, block=(16, 16)), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_integers_are_unpacked_as_they_were_packed(bits: int) -> None:
    top = 1 << (bits - 1)
    values = torch.randint(-top, top, (5, 37))
    assert torch.equal(unpacked(words(values, bits), bits, 37), values.to(torch.int8))


def test_a_weight_is_dequantized_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, values = block_float8("x", torch.randn(48, 32))
    stored, scale = parts["x.weight"], parts["x.weight_scale_inv"]
    monkeypatch.setattr("hisvd_cli.modeling.sources.dequantize.SLICE_VALUES", 32 * 7)
    assert torch.equal(scaled(stored, scale, torch.float32), values)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "awq": ({"quant_method": "awq"}, "AWQ"),
    "bitsandbytes": ({"load_in_4bit": True}, "bitsandbytes"),
    "hqq": ({"quant_method": "hqq"}, "HQQ"),
    "eetq": ({"quant_method": "eetq"}, "EETQ"),
    "quanto": ({"quant_method": "quanto"}, "quanto"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "unknown": ({"quant_method": "brand-new"}, "brand-new"),
    "unnamed": ({"bits": 3}, "an unnamed method"),
    "marlin": (
        {"quant_method": COMPRESSED, "format": "marlin-24"},
        f"{COMPRESSED}, marlin-24",
    ),
    "nvfp4": (
        {"quant_method": COMPRESSED, "format": "nvfp4-pack-quantized"},
        f"{COMPRESSED}, nvfp4-pack-quantized",
    ),
    "rotated": (
        {"quant_method": COMPRESSED, "transform_config": {"config_groups": {}}},
        f"{COMPRESSED}, rotated weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", ["eval", "inspect", "compress"])
def test_a_config_that_names_a_format_that_cannot_be_read(
    case: str, command: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    said, title = REFUSED[case]
    edit_json(folder / "config.json", quantization_config=said)
    (folder / "README.md").write_text("---\nbase_model: org/original\n---\n")
    words = ("compress", "--model") if command == "compress" else (command,)
    message, hint = fail(*words, folder)
    assert f"is quantized ({title}), a format that hisvd cannot dequantize" in message
    assert hint.endswith("'org/original' according to its card.")


MARKS = {
    "qweight": ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "GPTQ"),
    "absmax": ({"weight": torch.uint8, "weight.absmax": torch.float32}, "bitsandbytes"),
    "SCB": ({"weight": torch.int8, "SCB": torch.float32}, "bitsandbytes"),
    "W_q": ({"W_q": torch.uint8}, "HQQ"),
    "quanto": ({"weight._data": torch.int8, "weight._scale": torch.float32}, "quanto"),
    "eetq": ({"weight": torch.int8, "weight_scales": torch.float16}, "EETQ"),
    "nvfp4": ({"weight": torch.uint8, "weight_scale_2": torch.float32}, "NVFP4"),
    "int8": ({"weight": torch.int8}, "int8"),
    "uint8": ({"weight": torch.uint8}, "an unnamed method"),
}


@pytest.mark.parametrize("case", MARKS)
def test_tensors_alone_show_a_format_that_cannot_be_read(
    case: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    kinds, title = MARKS[case]

    def packer(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {f"{name}.{leaf}": weight.to(dtype) for leaf, dtype in kinds.items()}, weight

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    pack(folder, packer, None)
    message, _ = fail("eval", folder)
    assert f"is quantized ({title}, tensor model.layers." in message


@pytest.mark.parametrize(
    ("file", "said", "title"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 128}', "GPTQ"),
        ("quant_config.json", '{"zero_point": true, "w_bit": 4}', "AWQ"),
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "W4A16_AWQ"}}', "w4a16_awq"),
        ("quanto_qmap.json", "{}", "quanto"),
    ],
)
def test_a_file_beside_the_config_names_the_format(
    file: str, said: str, title: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    def packer(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {f"{name}.packed": weight.to(torch.int32)}, weight

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / file).write_text(said)
    open_source(str(folder)).weights  # noqa: B018  (weights are plain, whatever an old file says)
    pack(folder, packer, None)
    assert f"is quantized ({title}, tensor" in fail("eval", folder)[0]


@pytest.mark.parametrize("said", [[1], "int8", 4])
def test_a_quantization_config_that_is_no_object(
    said: object, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    edit_json(folder / "config.json", quantization_config=said)
    assert "quantization_config in config.json" in fail("eval", folder)[0]


def test_packed_integers_whose_values_straddle_words(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    pack(folder, partial(packed_integers, bits=3), FORMATS["packed 4 bits"][1])
    assert "is quantized (compressed-tensors, tensor model.layers.0" in fail("eval", folder)[0]


def test_a_quantized_weight_without_its_scale(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    pack(folder, bare_float8, FP8_BLOCKS)
    with pytest.raises(SourceError, match=r"lacks the scale of model\.layers\.0"):
        open_source(str(folder)).weights  # noqa: B018


def test_scales_that_do_not_fit_their_weight(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    pack(folder, block_float8, FP8_BLOCKS)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file({**tensors, name: torch.ones(3, 7)}, path, {"format": "pt"})
    message, _ = fail("eval", folder, "--dataset", text_file(tmp_path), "--seqlen", 32)
    assert "cannot be dequantized: scales [3, 7] do not match [32, 32]" in message


def test_a_model_of_the_hub_is_refused_before_its_weights_are_fetched(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("a" * 40)
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "model.safetensors").unlink()
    (folder / "quantize_config.json").write_text('{"bits": 4, "quant_method": "gptq"}')
    fetched: list[object] = []

    def snapshot(_name: str, _revision: str | None, patterns: object) -> Path:
        fetched.append(patterns)
        return folder

    monkeypatch.setattr("hisvd_cli.modeling.sources.opening._snapshot", snapshot)
    with pytest.raises(UnsupportedModelError, match="GPTQ"):
        open_source("org/model")
    assert len(fetched) == 1


def test_gpt_oss_in_mxfp4_is_evaluated_as_the_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "packed"
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, out = tensor.shape
            blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            stored[name] = plain[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    text = text_file(tmp_path, 200)
    expected = perplexity(plain_copy(folder, plain), text, "off")
    assert perplexity(folder, text, "on") == pytest.approx(expected, rel=1e-5)
    assert perplexity(folder, text, "off") == pytest.approx(expected, rel=1e-5)
