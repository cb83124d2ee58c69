"""A tiny llama as ``.gguf``, against the model that it was written from."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import SourceError
from hisvd_cli.utils.files.fingerprints import cache_root
from tests.conftest import MakeModel
from tests.models import random_text

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.bfloat16}


def write_gguf(folder: Path, path: Path, kind: str) -> Path:
    """Write a llama folder as llama.cpp's converter does, matrices as ``kind``."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text())["model"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        key = heads.get(name.split(".")[-2])
        array = (_interleave(tensor, config[key]) if key else tensor).numpy()
        stored = names.get_name(name, try_suffixes=(".weight",))
        quant = _quantization(array, kind)
        writer.add_tensor(stored, gguf.quants.quantize(array, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _quantization(array: Any, kind: str) -> Any:
    """Return the type of a tensor: vectors keep theirs, and rows must be whole blocks."""
    if array.ndim == 1:
        kind = "F32"
    elif kind == "Q8_0" and array.shape[1] % 32:
        kind = "F16"
    return gguf.GGMLQuantizationType[kind]


def _add_tokenizer(writer: Any, model: dict[str, Any]) -> None:
    tokens = sorted(model["vocab"], key=lambda token: int(model["vocab"][token]))
    tokens += [f"<unused{i}>" for i in range(len(tokens), 300)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rotary dimensions as llama.cpp has them: ``[heads · d, n]``, pairs side by side."""
    return (
        weight.view(heads, 2, -1, weight.shape[1])
        .transpose(1, 2)
        .reshape(weight.shape)
        .contiguous()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_is_the_model_that_it_was_written_from(
    kind: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    source = open_source(str(write_gguf(folder, tmp_path / "tiny.gguf", kind)))
    assert source.config.model_type == "llama"
    assert source.config.get_text_config().tie_word_embeddings
    expected = load_file(folder / "model.safetensors")
    assert {name for name in source.weights if name != "lm_head.weight"} == set(expected)
    for name, tensor in expected.items():
        found = source.weights.read(name)
        assert found.dtype == KINDS[kind]
        quant = _quantization(tensor.numpy(), kind)
        stored = gguf.quants.quantize(tensor.numpy(), quant)
        reference = torch.from_numpy(np.array(gguf.quants.dequantize(stored, quant)))
        assert torch.equal(found, reference.to(KINDS[kind])), name
    text = random_text(50)
    original = open_source(str(folder)).tokenizer
    assert source.tokenizer(text)["input_ids"] == original(text)["input_ids"]


def test_a_gguf_is_unpacked_once(tiny_model: MakeModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", "F32")
    first = open_source(str(path))
    config = first.folder / "config.json"
    before = config.stat().st_mtime_ns
    moved = Path(shutil.copyfile(path, tmp_path / "again.gguf"))
    assert open_source(str(path)).folder == first.folder
    assert config.stat().st_mtime_ns == before
    assert open_source(str(moved)).fingerprint == first.fingerprint
    assert all(not p.name.startswith(".") for p in (cache_root() / "gguf").iterdir())


@pytest.mark.skipif(not hasattr(transformers, "GgufConfig"), reason="nothing stays packed here")
def test_weights_are_unpacked_where_transformers_could_keep_them_packed(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transformers.AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["quantization_config"].dequantize
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    open_source(str(write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", "Q8_0")))


@pytest.mark.parametrize("cut", [0, 3, 100, 20_000])
def test_damaged_files_are_named(cut: int, tiny_model: MakeModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", "F32")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"tiny\.gguf is not a complete GGUF file"):
        open_source(str(path))
    assert not list((cache_root() / "gguf").glob("*"))


def test_an_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "never-heard-of")
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"transformers cannot read .*x\.gguf"):
        open_source(str(tmp_path / "x.gguf"))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    real = builtins.__import__

    def no_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(SourceError, match=r"x\.gguf needs the package 'gguf'") as caught:
        open_source(str(tmp_path / "x.gguf"))
    assert "hisvd[gguf]" in caught.value.hint
