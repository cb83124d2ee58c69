"""Tensors of a folder by name: single, sharded and .bin files, whole and damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hisvd_cli.modeling.sources.weights import INDEX, SINGLE, open_weights
from hisvd_cli.utils.errors import NumericalError, SourceError
from tests.conftest import MakeModel
from tests.models import edit_json, load_dense

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    weights = open_weights(folder)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert name in weights
        assert torch.equal(weights.read(name), tensor)
        info = weights.infos[name]
        assert info.shape == tuple(tensor.shape)
        assert f"torch.{info.dtype}" == str(tensor.dtype)
        assert info.nbytes == tensor.numel() * tensor.element_size()
    assert weights.total_bytes == sum(t.numel() * t.element_size() for t in expected.values())


def test_a_single_file(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama_untied")
    assert_holds(folder, load_file(folder / SINGLE))
    assert [path.name for path in open_weights(folder).files] == [SINGLE]


def test_shards(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = load_dense(tiny_model("llama_untied"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(open_weights(tmp_path).files) > 3
    assert_holds(tmp_path, load_file(tiny_model("llama_untied") / SINGLE))


@pytest.mark.parametrize("modern", [True, False])
def test_bin_files(modern: bool, tmp_path: Path) -> None:
    extra: dict[str, Any] = {**STATE, "step": 3}
    torch.save(extra, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
    assert_holds(tmp_path, STATE)


def test_bin_shards(tmp_path: Path) -> None:
    torch.save({"a": STATE["a"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": STATE["b"]}, tmp_path / "pytorch_model-2.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    edit_json(tmp_path / "pytorch_model.bin.index.json", weight_map=weight_map)
    assert_holds(tmp_path, STATE)


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_holds(tmp_path, STATE)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.target,)


def test_code_in_bin_files_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin .* no code in it was run") as caught:
        open_weights(tmp_path)
    assert "safetensors" in caught.value.hint
    assert "\n" not in caught.value.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2], 2), b"PK\x03\x04"])
def test_damaged_bin_files_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        open_weights(tmp_path)


def test_truncated_bin_files_are_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        open_weights(tmp_path)


def test_a_bin_file_that_holds_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="is not a state dict"):
        open_weights(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no weights"):
        open_weights(tmp_path)


def test_a_missing_shard_is_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    load_dense(tiny_model("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(SourceError, match=f"1 of {len(shards)} shards, such as {shards[1].name}"):
        open_weights(tmp_path)


def test_a_truncated_shard_is_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    load_dense(tiny_model("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SourceError, match=shard.name):
        open_weights(tmp_path)


def test_a_shard_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / SINGLE)
    weights = open_weights(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-10])
    with pytest.raises(SourceError, match=f"Cannot read a from .*{SINGLE}"):
        weights.read("a")


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(SourceError, match=f"{INDEX} is not a valid shard index"):
        open_weights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_are_not_finite_are_named(value: float, suffix: str, tmp_path: Path) -> None:
    state = {**STATE, "bad": torch.tensor([1.0, value, value])}
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / SINGLE)
    weights = open_weights(tmp_path)
    assert torch.equal(weights.read("a"), STATE["a"])
    with pytest.raises(
        NumericalError, match=r"bad in .* contains 2 values that are NaN or infinite"
    ):
        weights.read("bad")
