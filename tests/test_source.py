"""Models by name: paths, the demo model and the hub, which is played by a folder here."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import DEMO_FOLDER
from hisvd_cli.pipelines.samples import tokenizer_digest
from hisvd_cli.utils.errors import SourceError, UnsupportedModelError
from tests.cli_helpers import fail
from tests.conftest import MakeModel
from tests.models import edit_json, load_dense

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# Paths


@pytest.mark.parametrize("name", ["demo", "org/model", "gpt2"])
def test_a_path_that_exists_wins(
    name: str, tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(tiny_model("qwen3"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    source = open_source(name)
    assert (source.name, source.folder, source.revision) == (name, Path(name), None)
    assert source.config.model_type == "qwen3"


def test_demo_is_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_source("demo").folder == DEMO_FOLDER


def test_home_is_expanded(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(tiny_model("llama"), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/model").folder == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["", "./nowhere", "/no/where", "a/b/c", "model.gguf", "x/y.safetensors", "no where"]
)
def test_unknown_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not name:  # the empty path is the current folder
        with pytest.raises(SourceError, match=r"has no config\.json"):
            open_source(name)
        return
    with pytest.raises(SourceError, match=f"No model at '{name}'") as caught:
        open_source(name)
    assert "Hub id" in caught.value.hint


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    with pytest.raises(SourceError, match=r"is a file, but not a \.gguf file"):
        open_source(str(tmp_path / "x.bin"))


def test_a_pipe_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither a folder nor a regular file"):
        open_source(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "has no config.json"), ("{", "is not valid JSON"), ("[1]", "is not a JSON object")],
)
def test_folders_that_are_no_model(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


def test_a_missing_shard(tiny_model: MakeModel, tmp_path: Path) -> None:
    load_dense(tiny_model("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(SourceError, match="lacks 1 of"):
        _ = open_source(str(tmp_path)).weights


def test_a_missing_tokenizer(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"tokenizer of .* cannot be loaded"):
        _ = open_source(str(folder)).tokenizer


def test_an_unknown_type(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    edit_json(folder / "config.json", model_type="never_heard_of")
    with pytest.raises(UnsupportedModelError, match="never_heard_of") as caught:
        _ = open_source(str(folder)).config
    assert "`model.trust_remote_code`" in caught.value.hint


def test_code_of_a_model_runs_only_when_trusted(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    auto_map = {"AutoConfig": "code.Config"}
    edit_json(folder / "config.json", model_type="never_heard_of", auto_map=auto_map)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise OSError('run')\n")
    with pytest.raises(UnsupportedModelError):
        _ = open_source(str(folder)).config
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UnsupportedModelError, match="run"):
        _ = open_source(str(folder), trust_remote_code=True).config
    assert (tmp_path / "ran").exists()


# Fingerprints


def test_a_fingerprint_names_config_and_weights(tiny_model: MakeModel, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_source(str(folder)).fingerprint

    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    first = fingerprint()
    assert first == fingerprint()
    assert first == open_source(str(copy_of(folder, tmp_path / "elsewhere"))).fingerprint
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] += 1e-3  # same size, and perhaps within the same second
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    second = fingerprint()
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize(
    "name", ["generation_config.json", "quantize_config.json", "hf_quant_config.json"]
)
def test_a_fingerprint_names_all_files_that_change_the_model(
    name: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    found = [open_source(str(folder)).fingerprint]
    for said in ("1", "2"):
        (folder / name).write_text(f'{{"bits": {said}}}')
        found.append(open_source(str(folder)).fingerprint)
    assert len(set(found)) == 3


def test_a_fingerprint_names_code_that_is_trusted(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    plain = open_source(str(folder)).fingerprint
    found = []
    for code in ("1", "2"):
        (folder / "modeling_own.py").write_text(code)
        assert open_source(str(folder)).fingerprint == plain
        found.append(open_source(str(folder), trust_remote_code=True).fingerprint)
    assert len({*found, plain}) == 3


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.jinja"])
def test_a_tokenizer_is_named_by_all_its_files(
    name: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    found = []
    for text in ("{}", '{"bos_token": "<s>"}'):
        (folder / name).write_text(text)
        found.append(tokenizer_digest(open_source(str(folder))))
    assert found[0] != found[1]


# The hub


@dataclass
class FakeHub:
    """Plays ``snapshot_download``: what is asked for is copied from ``repository`` to ``cache``."""

    repository: Path
    cache: Path
    asked: list[tuple[str | None, list[str]]] = field(default_factory=list)

    def __call__(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "org/model"
        self.asked.append((revision, allow_patterns))
        snapshot = self.cache / "snapshots" / COMMIT
        for path in self.repository.rglob("*"):
            local = path.relative_to(self.repository).as_posix()
            if path.is_file() and any(fnmatch(local, pattern) for pattern in allow_patterns):
                (snapshot / local).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / local)
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    @property
    def fetched(self) -> set[str]:
        """Names of the weight files that were fetched."""
        found = [*self.cache.rglob("*.safetensors"), *self.cache.rglob("*.bin")]
        return {path.name for path in found}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_hub_model_is_fetched_in_two_steps(tiny_model: MakeModel, hub: FakeHub) -> None:
    copy_of(tiny_model("llama"), hub.repository)
    copy_of(tiny_model("llama"), hub.repository / "original")  # the same again, in a folder
    (hub.repository / "pytorch_model.bin").touch()
    source = open_source("org/model", "main")
    assert (source.name, source.revision) == ("org/model", COMMIT)
    assert [revision for revision, _ in hub.asked] == ["main", COMMIT]
    assert hub.asked[1][1] == ["model.safetensors"]
    assert hub.fetched == {"model.safetensors"}
    assert not (source.folder / "original" / "model.safetensors").exists()
    assert len(source.weights.files) == 1
    assert source.fingerprint == open_source("org/model").fingerprint


def test_shards_on_the_hub(tiny_model: MakeModel, hub: FakeHub) -> None:
    load_dense(tiny_model("llama")).save_pretrained(hub.repository, max_shard_size="20KB")
    (hub.repository / "consolidated.safetensors").touch()
    source = open_source("org/model")
    assert len(source.weights.files) > 3
    assert "consolidated.safetensors" not in hub.fetched


def test_bin_files_on_the_hub(tiny_model: MakeModel, hub: FakeHub) -> None:
    copy_of(tiny_model("llama"), hub.repository)
    state = load_file(hub.repository / "model.safetensors")
    (hub.repository / "model.safetensors").unlink()
    torch.save(state, hub.repository / "pytorch_model.bin")
    (hub.repository / "training_args.bin").touch()
    assert [path.name for path in open_source("org/model").weights.files] == ["pytorch_model.bin"]
    assert hub.fetched == {"pytorch_model.bin"}


def test_safetensors_come_before_bin_shards_on_the_hub(tiny_model: MakeModel, hub: FakeHub) -> None:
    copy_of(tiny_model("llama"), hub.repository)
    index = hub.repository / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    (hub.repository / "pytorch_model-1.bin").touch()
    open_source("org/model")
    assert hub.fetched == {"model.safetensors"}


def test_no_weights_on_the_hub(tiny_model: MakeModel, hub: FakeHub) -> None:
    copy_of(tiny_model("llama"), hub.repository)
    (hub.repository / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        open_source("org/model")


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "is_encoder_decoder": True},
    "bert": {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4},
    "unheard of": {"model_type": "never_heard_of"},
    "quantized": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_fail_before_their_weights(kind: str, hub: FakeHub) -> None:
    hub.repository.mkdir()
    (hub.repository / "config.json").write_text("{}")
    edit_json(hub.repository / "config.json", **UNSUPPORTED[kind])
    (hub.repository / "model.safetensors").write_bytes(b"very long")
    with pytest.raises(UnsupportedModelError):
        open_source("org/model")
    assert hub.fetched == set()


def test_other_models_can_be_opened_to_be_evaluated(tiny_model: MakeModel, hub: FakeHub) -> None:
    copy_of(tiny_model("llama"), hub.repository)
    edit_json(hub.repository / "config.json", quantization_config={"quant_method": "hisvd"})
    with pytest.raises(UnsupportedModelError, match="already compressed"):
        open_source("org/model")
    assert hub.fetched == set()
    assert open_source("org/model", compressible=False).folder.is_dir()


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_on_the_hub_is_fetched_with_its_base(
    with_config: bool, tiny_model: MakeModel, hub: FakeHub
) -> None:
    base = tiny_model("llama_untied")
    hub.repository.mkdir()
    if with_config:
        shutil.copyfile(base / "config.json", hub.repository / "config.json")
    said = {"peft_type": "LORA", "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (hub.repository / "adapter_config.json").write_text(json.dumps(said))
    name = "model.layers.0.self_attn.q_proj"
    halves = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    pair = {f"base_model.model.{name}.{half}.weight": each for half, each in halves.items()}
    save_file(pair, hub.repository / "adapter_model.safetensors")
    source = open_source("org/model")
    assert hub.fetched == {"adapter_model.safetensors"}
    stored = load_file(base / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(source.weights.read(f"{name}.weight"), stored + 2)
    plain = open_source(str(base)).fingerprint
    assert (source.name, source.fingerprint == plain) == ("org/model", False)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as e:
        open_source("org/never-fetched")
    told = "'org/never-fetched' is neither a local path nor reachable on the Hub (offline?)."
    assert e.value.message == told
    assert "network" in e.value.hint
    assert isinstance(e.value.__cause__, LocalEntryNotFoundError)


@pytest.mark.parametrize("shape", [(1, 48, 32), (1536,), (), (0, 32), (32, 48), (47, 32)])
def test_a_plan_finds_weights_of_another_shape(
    shape: tuple[int, ...], tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    assert tensors[name].shape == (48, 32)
    save_file({**tensors, name: torch.zeros(shape)}, folder / "model.safetensors", {"format": "pt"})
    message, _ = fail("plan", "--model", folder)
    assert message == f"{name} has the shape {list(shape)}, but the config requires [48, 32]."
