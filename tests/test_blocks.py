"""Block by block against the whole model: the same hidden states, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from hisvd_cli.modeling.block_arguments import Calls, run_stubs
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.structure.decoders import decoder_blocks
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.structure.tensors import tensor_names
from hisvd_cli.utils.errors import NumericalError, SourceError, UnsupportedModelError
from tests.conftest import MakeModel
from tests.models import CONFIGS, SLIDING_WINDOW, edit_json, load_dense, random_tokens

CPU = torch.device("cpu")
BATCH = 2
TOKENS = random_tokens(5, 24)  # two full batches and one sequence over


def walk_states(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the hidden states before the first block and after each, and check what is freed."""
    walk = BlockWalk(open_source(str(folder)), CPU, dtype, BATCH)
    walk.embed(tokens)
    yield walk.hidden.clone()
    for index in range(len(walk.layers)):
        walk.load(index)
        walk.advance(index)
        walk.free(index)
        yield walk.hidden.clone()
    assert {p.device.type for p in walk.model.parameters()} == {"meta"}


def dense_states(folder: Path, tokens: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the same from hooks on the whole model, in the same batches."""
    model = load_dense(folder, dtype)
    layers = model.get_decoder().layers
    states: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def entered(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states[0].append(args[0] if args else kwargs["hidden_states"])

    def left(index: int, output: Tensor | tuple[Tensor, ...]) -> None:
        states[index + 1].append(output[0] if isinstance(output, tuple) else output)

    layers[0].register_forward_pre_hook(entered, with_kwargs=True)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _a, out, index=index: left(index, out))
    with torch.no_grad():
        for ids in tokens.split(BATCH):
            model(input_ids=ids, use_cache=False)
    return [torch.cat(parts) for parts in states]


def assert_identical(
    folder: Path, reference: Path | None = None, dtype: torch.dtype = torch.float32
) -> None:
    expected = dense_states(reference or folder, TOKENS, dtype)
    for state, other in zip(walk_states(folder, TOKENS, dtype), expected, strict=True):
        assert state.dtype == dtype
        assert state.abs().mean() > 0.1  # states near zero would be alike for no good reason
        assert torch.equal(state, other)


@pytest.mark.parametrize("arch", CONFIGS)
def test_walk_equals_the_whole_model(arch: str, tiny_model: MakeModel) -> None:
    assert TOKENS.shape[1] > SLIDING_WINDOW
    assert_identical(tiny_model(arch))


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3_text"])
def test_walk_equals_the_whole_model_in_bfloat16(arch: str, tiny_model: MakeModel) -> None:
    assert_identical(tiny_model(arch), dtype=torch.bfloat16)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_walk_reads_sharded_checkpoints(arch: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    load_dense(tiny_model(arch)).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    assert_identical(tmp_path / "sharded", tiny_model(arch))


@pytest.mark.parametrize("modern", [True, False])
def test_walk_reads_bin_checkpoints(modern: bool, tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_without_weights(tiny_model("llama"), tmp_path / "bin")
    state = load_dense(tiny_model("llama")).state_dict()  # with the tied head, as of old
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
    assert_identical(folder, tiny_model("llama"))


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_walk_reads_headless_checkpoints(arch: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    AutoModel.from_pretrained(tiny_model(arch)).save_pretrained(folder)
    assert not any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    assert_identical(folder, tiny_model(arch))


def test_recording_alone_continues_from_stored_states(tiny_model: MakeModel) -> None:
    folder = tiny_model("mistral")
    expected = dense_states(folder, TOKENS, torch.float32)
    walk = BlockWalk(open_source(str(folder)), CPU, torch.float32, BATCH)
    walk.embed(TOKENS, compute_hidden=False)
    walk.hidden = expected[1].clone()
    walk.load(1)
    walk.advance(1)
    assert torch.equal(walk.hidden, expected[2])


def test_probe_leaves_the_hidden_states_alone(tiny_model: MakeModel) -> None:
    walk = BlockWalk(open_source(str(tiny_model("llama"))), CPU, torch.float32, BATCH)
    walk.embed(TOKENS[:4])  # no batch of one among these
    before = walk.hidden.clone()
    walk.load(0)
    walk.probe(0)
    assert torch.equal(walk.hidden, before)


def test_a_tied_head_is_named_once(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def names(**tensors: Tensor) -> dict[str, str]:
        state = load_file(tiny_model("llama") / "model.safetensors")
        matrix = state.pop(embedding)
        state |= {
            {"embedding": embedding, "head": head}[key]: matrix + shift
            for key, shift in tensors.items()
        }
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        source = open_source(str(folder))
        return tensor_names(build_meta_model(source), source)

    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert head not in names(embedding=zero)
    assert head not in names(embedding=zero, head=zero)
    only_head = names(head=zero)
    assert only_head[embedding] == head
    assert head not in only_head
    assert names(embedding=zero, head=one)[head] == head  # no copy: transformers keeps it too
    with pytest.raises(SourceError, match=embedding):
        names()


def test_an_untied_head_is_kept(tiny_model: MakeModel) -> None:
    source = open_source(str(tiny_model("llama_untied")))
    assert "lm_head.weight" in tensor_names(build_meta_model(source), source)


def test_the_config_of_the_source_is_not_changed(tiny_model: MakeModel) -> None:
    source = open_source(str(tiny_model("llama")))
    before = source.config.to_dict()
    build_meta_model(source, torch.bfloat16)
    assert source.config.to_dict() == before


def test_missing_and_misshapen_tensors(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = state.pop(name)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"lacks the tensor {name}"):
        BlockWalk(open_source(str(folder)), CPU, torch.float32, BATCH)
    save_file(state | {name: tensor[:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    walk = BlockWalk(open_source(str(folder)), CPU, torch.float32, BATCH)
    with pytest.raises(SourceError, match=rf"{name} has the shape \[47, 32\], .* \[48, 32\]"):
        walk.load(1)


def test_overflow_names_the_block(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] *= 1e38
    state["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    walk = BlockWalk(open_source(str(folder)), CPU, torch.float32, BATCH)
    walk.embed(TOKENS)
    for index in range(2):
        walk.load(index)
        if index == 0:
            walk.advance(index)
    with pytest.raises(NumericalError, match="output of block 1 is NaN or infinite"):
        walk.advance(1)


def test_arguments_that_depend_on_the_text_are_kept_for_each_batch(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with embeddings per block: replaying one batch's arguments for another would be wrong."""
    walk = BlockWalk(open_source(str(tiny_model("llama"))), CPU, torch.float32, BATCH)

    def with_embeddings(
        decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, form: int
    ) -> tuple[Tensor, Calls]:
        state, calls = run_stubs(decoder, layers, ids, form)
        given = {i: ((), {**kwargs, "of_text": ids + i}) for i, (_, kwargs) in calls.items()}
        return state, given

    monkeypatch.setattr("hisvd_cli.modeling.block_arguments.run_stubs", with_embeddings)
    walk.embed(TOKENS)
    for start in range(0, len(TOKENS), BATCH):
        part = TOKENS[start : start + BATCH]
        for index in range(len(walk.layers)):
            found = walk._recording.of(index, start, len(part), CPU)
            assert found is not None
            assert torch.equal(found[1]["of_text"], part + index)
    batches = [walk._recording.of(0, start, BATCH, CPU) or ((), {}) for start in (0, BATCH)]
    masks = [kwargs["position_embeddings"] for _, kwargs in batches]
    assert masks[0][0] is masks[1][0]  # what does not depend on the text is kept once


def test_compressed_and_quantized_models_are_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path)
    edit_json(folder / "config.json", quantization_config={"quant_method": "hisvd"})
    with pytest.raises(UnsupportedModelError, match="already compressed"):
        build_meta_model(open_source(str(folder)))
    build_meta_model(open_source(str(folder)), compressed=True)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized \(GPTQ\)"):
        build_meta_model(open_source(str(folder)), compressed=True)


def test_the_prefix_of_the_blocks_is_found(tiny_model: MakeModel) -> None:
    found = {
        arch: decoder_blocks(build_meta_model(open_source(str(tiny_model(arch)))))
        for arch in ("llama", "opt")
    }
    assert {arch: (prefix, len(layers)) for arch, (prefix, layers) in found.items()} == {
        "llama": ("model.layers", 3),
        "opt": ("model.decoder.layers", 4),
    }


def copy_of(folder: Path, parent: Path) -> Path:
    """Return a copy that may be edited."""
    return Path(shutil.copytree(folder, parent / folder.name, dirs_exist_ok=True))


def copy_without_weights(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target
