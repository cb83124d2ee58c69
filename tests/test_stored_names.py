"""Names that wrappers leave in a checkpoint, and tensors that are no part of the language model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli_helpers import digests, fail, perplexity, succeed, text_file
from tests.conftest import MakeModel
from tests.models import edit_json, load_dense

Rename = Callable[[str], str]
WRAPPERS: dict[str, Rename] = {
    "module": lambda name: f"module.{name}",
    "_orig_mod": lambda name: f"_orig_mod.{name}",
    "module._orig_mod": lambda name: f"module._orig_mod.{name}",
    "base_model.model": lambda name: f"base_model.model.{name}",
    "model": lambda name: f"model.{name}",
    "pretrained_model": lambda name: f"pretrained_model.{name}",
    "compiled blocks": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "self_attn.", "_checkpoint_wrapped_module.self_attn."
    ),
    "headless in a wrapper": lambda name: f"module.{name.removeprefix('model.')}",
}


def renamed(model: Path, folder: Path, rename: Rename, **more: Tensor) -> Path:
    """Copy a model, with other names of its tensors and more of them."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    changed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({**changed, **more}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_wrappers_are_left_out_and_named(
    wrapper: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    base, text = tiny_model("llama"), text_file(tmp_path, 200)
    folder = renamed(base, tmp_path / "wrapped", WRAPPERS[wrapper])
    expected = perplexity(base, text, "off")
    for stream in ("on", "off"):
        assert perplexity(folder, text, stream) == pytest.approx(expected, rel=1e-6)
    done = succeed("inspect", folder, "--json")
    assert json.loads(done.stdout)["problems"] == []
    assert "Warning: Renamed: " in done.stderr
    assert "Ignored" not in done.stderr


def test_a_wrapped_model_is_compressed_to_the_bytes_of_the_bare_one(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    base, text = tiny_model("llama"), text_file(tmp_path, 400)
    folder = renamed(base, tmp_path / "wrapped", WRAPPERS["module"])
    options = ("--ratio", 0.7, "--dataset", text, "--samples", 4, "--seqlen", 32, "--no-evaluate")
    made = []
    for source in (base, folder):
        output = tmp_path / f"made-{source.name}"
        succeed("compress", "--model", source, *options, "-o", output)
        made.append(digests(output)["model.safetensors"])
    assert made[0] == made[1]


SURPLUS = {
    "v_head.summary.weight": ("of a value or classification head", (1, 32)),
    "score.weight": ("of a value or classification head", (2, 32)),
    "model.layers.3.mlp.up_proj.weight": ("of blocks beyond the 3 of the config", (48, 32)),
    "mtp.proj.weight": ("that the model does not use", (32, 64)),
}


@pytest.mark.parametrize("name", SURPLUS)
@pytest.mark.parametrize("command", ["eval", "inspect", "plan"])
def test_tensors_that_are_ignored_are_named(
    name: str, command: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    kind, shape = SURPLUS[name]
    more = {name: torch.ones(shape)}
    folder = renamed(tiny_model("llama"), tmp_path / "more", str, **more)
    words: tuple[object, ...] = (command, folder)
    if command == "eval":
        words = (*words, "--dataset", text_file(tmp_path, 200), "--seqlen", 32)
    if command == "plan":
        words = ("plan", "--model", folder, "--ratio", 0.7)
    done = succeed(*words)
    assert f"Warning: Ignored: 1 tensor {kind}, such as {name}." in done.stderr


def test_tables_that_older_versions_stored_are_not_worth_a_word(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = renamed(tiny_model("llama"), tmp_path / "more", str, **more)
    assert "Warning" not in succeed("inspect", folder).stderr


def test_a_value_model_in_a_wrapper(tiny_model: MakeModel, tmp_path: Path) -> None:
    more = {"v_head.summary.weight": torch.ones(1, 32)}
    wrapped = WRAPPERS["pretrained_model"]
    folder = renamed(tiny_model("llama"), tmp_path / "more", wrapped, **more)
    told = succeed("inspect", folder).stderr
    assert "Renamed: 29 tensors" in told
    assert "Ignored: 1 tensor of a value or classification head" in told


def test_a_classifier_is_not_called_damaged(tiny_model: MakeModel, tmp_path: Path) -> None:
    more = {"score.weight": torch.ones(2, 32)}
    folder = renamed(tiny_model("llama_untied"), tmp_path / "more", str, **more)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})
    options = ("--dataset", text_file(tmp_path, 200), "--seqlen", 32)
    for stream in ("on", "off"):
        message, hint = fail("eval", folder, *options, "--stream", stream)
        assert "has a value or classification head (score.weight) and no lm_head" in message
        assert "trained from" in hint


def test_an_adapter_among_the_weights(tiny_model: MakeModel, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        inner = name.replace("q_proj.weight", "q_proj.base_layer.weight")
        return f"base_model.model.{inner}"

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    more = {name: torch.ones(2, 32)}
    folder = renamed(tiny_model("llama"), tmp_path / "more", rename, **more)
    options = ("--dataset", text_file(tmp_path, 200), "--seqlen", 32)
    for stream in ("on", "off"):
        message, hint = fail("eval", folder, *options, "--stream", stream)
        assert "contain an unmerged adapter" in message
        assert "merge_and_unload" in hint


@pytest.fixture
def own_head(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A model whose config ties a head that differs from the embedding on disk."""
    return renamed(
        tiny_model("llama"),
        tmp_path / "own-head",
        str,
        **{"lm_head.weight": torch.randn(300, 32, generator=torch.Generator().manual_seed(1))},
    )


def test_a_head_that_differs_although_it_is_tied_counts_whole_and_streamed(
    own_head: Path, tmp_path: Path
) -> None:
    text = text_file(tmp_path, 200)
    apart = tmp_path / "apart"
    shutil.copytree(own_head, apart)
    edit_json(apart / "config.json", tie_word_embeddings=False)
    expected = perplexity(apart, text, "off")
    for stream in ("on", "off"):
        assert perplexity(own_head, text, stream) == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_with_a_head_of_its_own_says_so(own_head: Path, tmp_path: Path) -> None:
    import hisvd_cli  # noqa: F401  (registers the loader)

    text, made = text_file(tmp_path, 400), tmp_path / "made"
    options = ("--ratio", 0.7, "--dataset", text, "--samples", 4, "--seqlen", 32, "--no-evaluate")
    succeed("compress", "--model", own_head, *options, "-o", made)
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    model: Any = load_dense(made)
    stored = load_file(own_head / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    other = text_file(tmp_path, 200, seed=1)
    streamed, whole = (perplexity(made, other, stream) for stream in ("on", "off"))
    assert streamed == pytest.approx(whole, rel=1e-6)
