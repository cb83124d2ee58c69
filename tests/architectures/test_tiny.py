"""The builder of tiny models: sizes, kinds of layers, names on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures.factors import read_tensors
from tests.architectures.registry import architectures, config_class, out_of_scope
from tests.architectures.sizes import representatives, special_tokens, tiny_rope
from tests.architectures.tiny import build, save, tiny_config


def test_widths_differ() -> None:
    layer = build(architectures()["llama"]).model.layers[0]
    shapes = {
        tuple(each.weight.shape) for each in layer.modules() if isinstance(each, torch.nn.Linear)
    }
    assert shapes == {(96, 64), (48, 64), (64, 96), (112, 64), (64, 112)}


def test_weights_depend_on_the_seed_alone() -> None:
    states = [build(architectures()["llama"], seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("gemma3_text", "layer_types"),
        ("qwen3_next", "layer_types"),
        ("deepseek_v32", "mlp_layer_types"),
        ("lfm2_moe", "layer_types"),
        ("zamba2", "layers_block_type"),
    ],
)
def test_each_kind_of_layer_occurs(name: str, field: str) -> None:
    kinds = getattr(config_class(name)(), field) or ["conv", "full_attention"]
    assert {*kinds} == {*getattr(tiny_config(architectures()[name]), field)}


def test_routers_spread_tokens() -> None:
    model = build(architectures()["qwen3_moe"])
    tokens = torch.randint(2000, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens, output_router_logits=True).router_logits
    for each in logits:
        assert torch.bincount(each.argmax(-1), minlength=4).min() > 0


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj.weight"),
        ("gemma3", "language_model.model.layers.0.mlp.gate_proj.weight"),
        ("gpt_neox", "embed_out.weight"),
    ],
)
def test_files_have_the_names_of_the_hub(name: str, stored: str, tmp_path: Path) -> None:
    save(architectures()[name], tmp_path)
    assert stored in read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bert", "encoder"),
        ("bart", "encoder-decoder"),
        ("t5gemma2", "encoder-decoder"),
        ("musicgen", "audio codes"),
        ("gpt_neox", None),
        ("llama", None),
        ("qwen2_5_vl", None),
    ],
)
def test_scope(name: str, part: str | None) -> None:
    why = out_of_scope(architectures()[name])
    assert why is None if part is None else part in str(why)


def test_representatives_show_each_combination() -> None:
    lists = [list("aaabaaab"), list("xyyyyyyy")]
    assert representatives(lists, 2) == [0, 1, 3]
    assert representatives(lists, 5) == [0, 1, 2, 3, 4]
    assert representatives([], 3) == [0, 1, 2]


def test_rotary_sections_fill_half_a_head() -> None:
    sizes = {"head_dim": 24}
    rope: dict[str, Any] = {"mrope_section": [16, 24, 24], "rope_theta": 1.0}
    assert tiny_rope(rope, sizes) == {"mrope_section": [4, 4, 4], "rope_theta": 1.0}
    nested = {"full_attention": {"partial_rotary_factor": 0.5, "long_factor": [2.0] * 64}}
    assert tiny_rope(nested, sizes)["full_attention"]["long_factor"] == [1.0] * 6


def test_tokens_of_media_are_apart_from_text() -> None:
    found = special_tokens(["bos_token_id", "image_token_id", "video_token_index", "hidden_size"])
    assert found == {"image_token_id": 2111, "video_token_index": 2110}
