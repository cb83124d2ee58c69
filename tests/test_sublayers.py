"""Which linears are found, what they are called, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
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
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "num_local_experts": 2,
}


def meta_model(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    with init_empty_weights():
        return kind.from_config(config)


def test_the_mixture_of_experts_of_this_transformers() -> None:
    """Stacked tensors in transformers 5, a list of modules before."""
    model = meta_model(transformers.MixtralConfig(**MIXTURE))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\..*experts") as caught:
        sublayers_of(model)
    assert "Supported" in caught.value.hint


def test_a_list_of_experts() -> None:
    block = blocks_of(("attn.dense",))[0]
    block.add_module("experts", nn.ModuleList(blocks_of(("w1", "w2"), ("w1", "w2"))))
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.experts is a list of 2 modules"):
        find_sublayers("h", [block])


def test_stacked_experts() -> None:
    block = blocks_of(("attn.dense", "mlp.gate"))[0]
    experts = nn.Module()
    experts.w1 = nn.Parameter(torch.zeros(4, 2, 3))
    block.add_module("experts", experts)
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.experts\.w1 .* has 3 dimensions"):
        find_sublayers("h", [block])


def test_a_list_without_weights_is_no_mixture() -> None:
    block = blocks_of(("attn.dense",))[0]
    block.add_module("norms", nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)]))
    assert len(find_sublayers("h", [block])) == 1


def test_matrices_that_are_no_linear() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=30)
    layers = list(meta_model(config).transformer.h)
    expected = r"transformer\.h\.0\.attn\.c_attn\.weight is a matrix of a Conv1D"
    with pytest.raises(UnsupportedModelError, match=expected):
        find_sublayers("transformer.h", layers)
    block = blocks_of(("attn.dense",))[0]
    block.register_parameter("bias", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.bias is a matrix of a Module"):
        find_sublayers("h", [block])


def test_a_block_without_linears() -> None:
    with pytest.raises(UnsupportedModelError, match=r"h\.0 has no torch\.nn\.Linear"):
        find_sublayers("h", [nn.LayerNorm(2)])


@pytest.mark.parametrize("kind", ["BertConfig", "GPT2Config"])
def test_models_without_a_list_of_decoder_blocks(kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = meta_model(getattr(transformers, kind)(**sizes))
    with pytest.raises(UnsupportedModelError, match=r"no list of decoder blocks") as caught:
        sublayers_of(model)
    assert "Supported" in caught.value.hint


@pytest.mark.parametrize("kind", ["T5Config", "BartConfig"])
def test_models_with_an_encoder(kind: str, tmp_path: Any) -> None:
    getattr(transformers, kind)(vocab_size=30, d_model=32).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder model"):
        build_meta_model(open_source(str(tmp_path)))


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
