"""Which linear layers and stacks of experts are found, their names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.expert_linears import separate_experts
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import Sublayer, find_sublayers, select
from hisvd_cli.utils.errors import UnsupportedModelError, UsageError
from tests.conftest import MakeModel
from tests.models import CONFIGS

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLUSTERS: dict[str, list[str]] = {
    **dict.fromkeys(CONFIGS, LLAMA),
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
}


def sublayers_of(model: Any) -> list[Sublayer]:
    prefix, layers = decoder_blocks(model)
    return find_sublayers(prefix, list(layers))


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_matrix_of_every_block_is_found(arch: str, tiny_model: MakeModel) -> None:
    model = build_meta_model(open_source(str(tiny_model(arch))))
    found = sublayers_of(model)
    blocks = {name for name in model.state_dict() if ".layers." in name}
    matrices = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name in blocks and tensor.ndim == 2
    }
    assert {s.name: s.shape for s in found} == matrices
    assert all(f".layers.{s.layer}." in s.name for s in found)
    count = model.config.num_hidden_layers
    assert sorted(s.cluster for s in found) == sorted(CLUSTERS[arch] * count)
    assert all(s.name.endswith(s.cluster) for s in found)


def blocks_of(*names: tuple[str, ...]) -> list[nn.Module]:
    """Return a block for each tuple of names of linears."""
    blocks = []
    for mine in names:
        block = nn.Module()
        for name in mine:
            parent: nn.Module = block
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.Linear(2, 3))
        blocks.append(block)
    return blocks


def test_clusters_have_the_shortest_name_that_tells_them_apart() -> None:
    found = find_sublayers("h", blocks_of(("attn.dense", "mlp.dense", "mlp.up")))
    assert [s.cluster for s in found] == ["attn.dense", "mlp.dense", "up"]
    assert [s.name for s in found] == ["h.0.attn.dense", "h.0.mlp.dense", "h.0.mlp.up"]
    assert {s.shape for s in found} == {(3, 2)}


def test_clusters_are_told_apart_over_all_blocks() -> None:
    """Two types must not fall into one because no single block holds both."""
    found = find_sublayers("h", blocks_of(("attn.dense",), ("mlp.dense",), ("attn.dense",)))
    assert [s.cluster for s in found] == ["attn.dense", "mlp.dense", "attn.dense"]


MIXTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "num_local_experts": 2,
}


def meta_model(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    with init_empty_weights():
        return kind.from_config(config)


def working_model(folder: Path, config: Any) -> Any:
    """Return the model on which hisvd works, without weights."""
    config.save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return build_meta_model(open_source(str(folder)))


def test_stacks_of_experts_have_the_shape_of_their_parameter(tmp_path: Path) -> None:
    """[E, m, n], with one linear layer per expert in the working model; routers stay dense."""
    model = working_model(tmp_path, transformers.MixtralConfig(**MIXTURE))
    whole = meta_model(transformers.MixtralConfig(**MIXTURE))
    found = {s.name: s for s in sublayers_of(model) if s.layer == 1}
    stacks = {name: s.shape for name, s in found.items() if len(s.shape) == 3}
    assert stacks == {
        name: tuple(parameter.shape)
        for name, parameter in whole.named_parameters()
        if parameter.ndim == 3 and ".1." in name
    }
    assert set(stacks.values()) == {(2, 96, 32), (2, 32, 48)}
    assert not any("gate" in s.cluster.split(".") for s in found.values())
    for name in stacks:
        assert found[name].members == [f"{name}.0", f"{name}.1"]
        assert found[name].cluster == name.rpartition(".")[2]
        shapes = {model.get_submodule(each).weight.shape for each in found[name].members}
        assert shapes == {stacks[name][1:]}


def test_transposed_stacks_have_the_shape_of_the_map(tmp_path: Path) -> None:
    """gpt-oss stores [E, n, m]."""
    config = transformers.GptOssConfig(**MIXTURE, head_dim=8, num_experts_per_tok=1)
    found = {s.cluster: s.shape for s in sublayers_of(working_model(tmp_path, config))}
    whole = dict(meta_model(config).model.layers[0].mlp.experts.named_parameters())
    assert tuple(whole["gate_up_proj"].shape) == (2, 32, 96)
    assert (found["gate_up_proj"], found["down_proj"]) == ((2, 96, 32), (2, 32, 48))


def test_a_list_of_experts_is_a_linear_layer_each() -> None:
    block = blocks_of(("attn.dense",))[0]
    block.add_module("experts", nn.ModuleList(blocks_of(("w1", "w2"), ("w1", "w2"))))
    found = find_sublayers("h", [block])
    inner = [f"experts.{i}.{name}" for i in range(2) for name in ("w1", "w2")]
    assert [s.name for s in found] == [f"h.0.{name}" for name in ("attn.dense", *inner)]
    assert {s.shape for s in found} == {(3, 2)}


@pytest.mark.parametrize(
    "shape",
    [(4,), (2, 2), (4, 2, 3), (2, 2, 3, 3)],
    ids=["vector", "matrix", "unknown stack", "kernel"],
)
def test_other_parameters_stay_dense(shape: tuple[int, ...]) -> None:
    block = blocks_of(("attn.dense", "mlp.up"))[0]
    block.register_parameter("state", nn.Parameter(torch.zeros(shape)))
    separate_experts(block)
    assert [s.name for s in find_sublayers("h", [block])] == ["h.0.attn.dense", "h.0.mlp.up"]


def test_other_modules_stay_dense() -> None:
    block = blocks_of(("attn.dense",))[0]
    block.add_module("norms", nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)]))
    block.add_module("conv", nn.Conv1d(3, 3, 2))
    block.add_module("embedding", nn.Embedding(3, 2))
    block.add_module("gate", nn.Linear(2, 1))  # one output: it has no lower rank
    assert [s.name for s in find_sublayers("h", [block])] == ["h.0.attn.dense"]


def test_layers_of_gpt2_are_turned(tmp_path: Path) -> None:
    """transformers stores [n, m] in a Conv1D."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=30, n_inner=40)
    found = [s for s in sublayers_of(working_model(tmp_path, config)) if s.layer == 0]
    assert {s.name.removeprefix("transformer.h.0."): s.shape for s in found} == {
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (40, 32),
        "mlp.c_proj": (32, 40),
    }
    weight = meta_model(config).transformer.h[0].mlp.c_fc.weight
    assert tuple(weight.shape) == (32, 40)


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(UnsupportedModelError, match="The blocks in h have no linear layers") as e:
        find_sublayers("h", [nn.LayerNorm(2), nn.Conv1d(3, 3, 2)])
    assert "Supported" in e.value.hint
    block = blocks_of(("attn.dense",))[0]
    assert len(find_sublayers("h", [nn.LayerNorm(2), block])) == 1


def test_models_without_a_list_of_decoder_blocks() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = transformers.LlamaConfig()  # type: ignore[assignment]  # for decoder_blocks
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks") as caught:
        decoder_blocks(cast(Any, model))
    assert "Supported" in caught.value.hint


ENCODERS = {
    "T5Config": "encoder-decoder",
    "BartConfig": "encoder-decoder",
    "BertConfig": "encoder",
    "XLMRobertaConfig": "encoder",
}
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_out_of_scope(kind: str, tmp_path: Path) -> None:
    told = rf"is an {ENCODERS[kind]} model, which is out of scope: hisvd compresses decoders\.$"
    with pytest.raises(UnsupportedModelError, match=told) as caught:
        working_model(tmp_path, getattr(transformers, kind)(**SMALL))
    assert "Supported" in caught.value.hint


def test_an_encoder_class_that_is_set_up_as_a_decoder(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=48, is_decoder=True)
    clusters = [s.cluster for s in sublayers_of(working_model(tmp_path, config)) if s.layer == 0]
    assert len(clusters) == 6
    assert {"query", "key", "value"} < {*clusters}


def test_models_that_are_no_language_model(tmp_path: Any) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"\('vit'\) cannot be built as a causal"):
        build_meta_model(open_source(str(tmp_path)))


# Selection

ALL = find_sublayers("model.layers", blocks_of(*[("self_attn.q_proj", "mlp.up_proj")] * 12))


def names_of(include: list[str], exclude: list[str]) -> list[str]:
    return [s.name.removeprefix("model.layers.") for s in select(ALL, include, exclude)]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], 24),
        (["q_proj"], [], 12),
        (["*_proj"], [], 24),
        ([], ["up_proj"], 12),
        (["mlp.*"], [], 12),
        (["self_attn.q_proj", "up_proj"], [], 24),
        (["model.layers.1.*"], [], 2),
        (["layers.[0-2].*"], [], 6),
        (["layers.1*"], ["q_proj"], 3),  # 1, 10 and 11
        (["1.mlp.up_proj"], [], 1),  # not that of block 11
    ],
)
def test_patterns(include: list[str], exclude: list[str], expected: int) -> None:
    assert len(names_of(include, exclude)) == expected


def test_selection_keeps_the_order() -> None:
    assert names_of(["up_proj", "layers.0.*"], [])[:3] == [
        "0.self_attn.q_proj",
        "0.mlp.up_proj",
        "1.mlp.up_proj",
    ]


def test_a_pattern_that_matches_nothing_is_named() -> None:
    for include, exclude in (["w_proj"], []), ([], ["w_proj"]):
        with pytest.raises(UsageError, match="'w_proj' does not match any layer") as caught:
            select(ALL, include, exclude)
        assert caught.value.hint == "Layer types: q_proj, up_proj."


def test_an_empty_selection() -> None:
    with pytest.raises(UsageError, match="select no layer"):
        select(ALL, ["q_proj"], ["*_proj"])
