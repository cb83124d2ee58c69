"""Tensors read through the rules of transformers, against models that transformers loads whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hisvd_cli as hisvd
from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.compression.layout import lay_out
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.sublayers import find_sublayers
from hisvd_cli.modeling.structure.tensors import read_tensor, tensor_names
from hisvd_cli.utils.errors import SourceError
from tests.architectures.case import load_whole
from tests.architectures.factors import dense_parameter, factors, read_tensors
from tests.architectures.registry import architectures
from tests.architectures.tiny import save

EXPERTS = {
    "mixtral": ("model.layers.1.mlp.experts.gate_up_proj", "block_sparse_moe.experts.{}.w1.weight"),
    "qwen3_moe": ("model.layers.1.mlp.experts.gate_up_proj", "experts.{}.up_proj.weight"),
    "ernie4_5_moe": ("model.layers.1.mlp.experts.down_proj", "experts.{}.down_proj.weight"),
}
"""Type with experts that are stored one by one → a stack, and what its tensors on disk end in."""
STACKED = ("llama4_text", "gpt_oss")
"""Types with experts that are stored together, transposed."""
OTHERS = ("gemma3", "gpt_neox", "gpt2", "molmo2", "zamba2")
ALL = (*EXPERTS, *STACKED, *OTHERS)

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return folders with a tiny model by type, each made once; do not edit them."""

    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        save(architectures()[name], folder)
        return folder

    return cache(made)


@pytest.fixture(scope="module")
def whole(saved: Saved) -> Callable[[str], PreTrainedModel]:
    """Return models that transformers loads from these folders."""
    return cache(lambda name: load_whole(architectures()[name], saved(name)))


Whole = Callable[[str], PreTrainedModel]


def expected_tensors(model: PreTrainedModel, stacks: set[str]) -> dict[str, Tensor]:
    """Return the tensors of the working model, cut from those of transformers."""
    turned = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in stacks:
            matrices = tensor.mT if model.config.model_type in STACKED else tensor
            found |= {f"{name}.{i}.weight": matrix for i, matrix in enumerate(matrices)}
        else:
            found[name] = tensor.T if name in turned else tensor
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_that_of_transformers(name: str, saved: Saved, whole: Whole) -> None:
    source, model = open_source(str(saved(name))), whole(name)
    working = build_meta_model(source)
    prefix, layers = decoder_blocks(working)
    stacks = {s.name for s in find_sublayers(prefix, list(layers)) if len(s.shape) == 3}
    assert bool(stacks) == (name in EXPERTS or name in STACKED)
    expected = expected_tensors(model, stacks)
    names = tensor_names(working, source)
    shapes = {each: t.shape for each, t in working.state_dict().items()}
    for each, stored in names.items():
        read = read_tensor(source, stored, each, shapes[each], torch.float32)
        assert torch.equal(read, expected[each]), each
    left = {each for each in expected if each not in names}
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    assert left == ({"lm_head.weight"} & set(expected) if tied else set())


def test_tied_blocks_are_read_from_the_block_that_is_stored(saved: Saved, whole: Whole) -> None:
    """Two hybrid blocks of Zamba2 share a transformer layer, which is stored once."""
    source = open_source(str(saved("zamba2")))
    names = tensor_names(build_meta_model(source), source)
    own = [name for name in names if ".shared_transformer." in name and "q_proj" in name]
    assert len({name.split(".")[2] for name in own}) == 2
    stored = {names[name] for name in own}
    assert len(stored) < len(own)
    assert stored <= set(read_tensors(saved("zamba2")))
    for name in own:
        assert torch.equal(source.weights.read(names[name]), whole("zamba2").state_dict()[name])


def test_fused_tensors_are_split(saved: Saved) -> None:
    """Molmo2 stores queries, keys and values as one tensor."""
    source = open_source(str(saved("molmo2")))
    names = tensor_names(build_meta_model(source), source)
    prefix = "model.language_model.layers.0.self_attn"
    three = [names[f"{prefix}.{leaf}.weight"] for leaf in ("q_proj", "k_proj", "v_proj")]
    origins = {source.weights.derived[name].stored for name in three}
    assert origins == {("model.transformer.blocks.0.self_attn.att_proj.weight",)}
    fused = read_tensors(saved("molmo2"))["model.transformer.blocks.0.self_attn.att_proj.weight"]
    assert torch.equal(torch.cat([source.weights.read(name) for name in three]), fused)


# Experts


class Counted:
    """Counts the names that are read from disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole: list[str] = []
        self.slices: list[tuple[str, int]] = []
        read, read_slice = Weights.read, Weights.read_slice

        def counted(weights: Weights, name: str) -> Tensor:
            if name in weights.where:
                self.whole.append(name)
            return read(weights, name)

        def sliced(weights: Weights, name: str, index: int) -> Tensor:
            self.slices.append((name, index))
            return read_slice(weights, name, index)

        monkeypatch.setattr(Weights, "read", counted)
        monkeypatch.setattr(Weights, "read_slice", sliced)


@pytest.mark.parametrize("name", EXPERTS)
def test_one_expert_is_read_alone(name: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(saved(name)))
    names = tensor_names(build_meta_model(source), source)
    counted = Counted(monkeypatch)
    source.weights.read(names[f"{EXPERTS[name][0]}.2.weight"])
    assert len(counted.whole) == (1 if "down" in EXPERTS[name][0] else 2)
    assert all(".experts.2." in each and ".layers.1." in each for each in counted.whole)


@pytest.mark.parametrize("name", STACKED)
def test_a_slice_is_read_of_experts_that_are_stored_together(
    name: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(saved(name)))
    names = tensor_names(build_meta_model(source), source)
    member = next(each for each in names if each.endswith("experts.down_proj.2.weight"))
    counted = Counted(monkeypatch)
    source.weights.read(names[member])
    assert counted.whole == []
    assert counted.slices == [(member.removesuffix(".2.weight"), 2)]


def test_a_missing_expert_is_named(saved: Saved, tmp_path: Path) -> None:
    """Whichever it is: the last one may not pass for a stack of fewer."""
    for name, (_, ending) in EXPERTS.items():
        tensors = read_tensors(saved(name))
        count = 1 + max(int(n) for key in tensors for n in re.findall(r"\.experts\.(\d+)\.", key))
        for expert in (1, count - 1):
            lost = next(
                key for key in tensors if ".1." in key and key.endswith(ending.format(expert))
            )
            folder = tmp_path / f"{name}-{expert}"
            folder.mkdir()
            (folder / "config.json").write_text((saved(name) / "config.json").read_text())
            kept = {key: tensor for key, tensor in tensors.items() if key != lost}
            save_file(kept, folder / "model.safetensors", {"format": "pt"})
            source = open_source(str(folder))
            with pytest.raises(SourceError) as caught:
                read_all(source)
            assert f"lacks the tensor {lost}," in caught.value.message


def read_all(source: Source) -> None:
    """Read each tensor as a walk does."""
    working = build_meta_model(source)
    shapes = {each: t.shape for each, t in working.state_dict().items()}
    for each, stored in tensor_names(working, source).items():
        read_tensor(source, stored, each, shapes[each], torch.float32)


# Checkpoints


@pytest.mark.parametrize("name", ALL)
def test_checkpoints_load_and_become_dense_again(
    name: str, saved: Saved, whole: Whole, tmp_path: Path
) -> None:
    """Names written are those of the layout; names of the dense model are the original's."""
    plain: dict[str, Any] = {"allocator": "uniform", "decomposer": "svd", "ratio": 0.5}
    plain |= {"dataset": "demo", "seqlen": 16, "samples": 2, "progress": False}
    folder, dense = tmp_path / "checkpoint", tmp_path / "dense"
    hisvd.compress(str(saved(name)), output=folder, evaluate=False, device="cpu", **plain)
    plan = load_plan(folder / "plan.json")
    layout = lay_out(open_source(str(saved(name))), plan.ranks, plan.storage)
    written = {each for part in layout.parts.values() for each in part.names(plan.storage)}
    assert written == set(read_tensors(folder))
    loaded, original = load_whole(architectures()[name], folder), whole(name)
    pairs = factors(original, folder)
    assert pairs.keys() == plan.ranks.keys()
    state = loaded.state_dict()
    for each, tensor in original.state_dict().items():
        if each.removesuffix(".weight") not in pairs:
            assert torch.equal(state[each], tensor), each
    hisvd.convert(folder, to="dense", output=dense, progress=False)
    shapes = [{n: t.shape for n, t in read_tensors(f).items()} for f in (saved(name), dense)]
    assert shapes[0] == shapes[1]
    again = load_whole(architectures()[name], dense).state_dict()
    for each, (u, v) in pairs.items():
        weight = again[each] if each in again else again[f"{each}.weight"]
        turned = name in STACKED if each in again else dense_parameter(original, each)[1]
        product = (u @ v).float()
        torch.testing.assert_close(
            weight.mT if turned else weight, product, rtol=1e-4, atol=1e-5, msg=each
        )
