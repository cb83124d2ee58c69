"""Converting: the same model in every form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.layers.lowrank import LAYERS
from hisvd_cli.modeling.whole_model import load_model
from hisvd_cli.pipelines.conversion import Target, convert_checkpoint
from hisvd_cli.utils.errors import OutputError, SourceError, UsageError
from tests.workbench import bench, compress_to, plan_at, tree


@pytest.fixture(scope="module", params=LAYERS)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    root = tmp_path_factory.mktemp("convert")
    made = bench(root, f"plan.storage={request.param}")
    compress_to(made, plan_at(made, 0.6), root / "low")
    return root / "low"


def _logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(30).view(1, 30)).logits
    return logits


def test_pt_holds_plain_types_and_comes_back_the_same(folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(folder, "pt", tmp_path / "low.pt", False, 10**9)
    document = torch.load(tmp_path / "low.pt", weights_only=True)
    assert document["config"] == open_checkpoint(folder).config
    convert_checkpoint(tmp_path / "low.pt", "hf", tmp_path / "back", False, 10**9)
    before, after = tree(folder), tree(tmp_path / "back")
    assert set(before) == set(after)
    weights = [open_checkpoint(f).weights for f in (folder, tmp_path / "back")]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.equal(weights[0].read(n), weights[1].read(n)) for n in weights[0])
    same = [n for n in before if n not in ("model.safetensors", "config.json")]
    assert {n: before[n] for n in same} == {n: after[n] for n in same}


@pytest.mark.parametrize("shard_bytes", [10**9, 900_000])
def test_dense_loads_without_hisvd_and_computes_the_same(
    folder: Path, tmp_path: Path, shard_bytes: int
) -> None:
    convert_checkpoint(folder, "dense", tmp_path / "dense", False, shard_bytes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert not list((tmp_path / "dense").glob("*.py"))
    with torch.no_grad():
        logits = model(torch.arange(30).view(1, 30)).logits
    # The products are rounded to the checkpoint's bfloat16.
    torch.testing.assert_close(logits, _logits(folder), rtol=0.05, atol=0.15)


def test_hf_to_hf_only_changes_the_shards(folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(folder, "hf", tmp_path / "small", False, 900_000)
    assert len(open_checkpoint(tmp_path / "small").weights.files) > 2
    torch.testing.assert_close(_logits(tmp_path / "small"), _logits(folder), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("pt", "folder", "cannot write"),
        ("dense", "x.pt", "cannot write"),
        ("dense", "occupied", "not empty"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, to: Target, name: str, message: str
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises((OutputError, UsageError), match=message):
        convert_checkpoint(folder, to, tmp_path / name, False, 10**9)
    assert tree(tmp_path) == before


def test_overwrite_never_removes_what_hisvd_did_not_write(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(OutputError, match="did not write"):
        convert_checkpoint(folder, "dense", tmp_path / "photos", True, 10**9)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no checkpoint"):
        convert_checkpoint(tmp_path / "absent", "hf", tmp_path / "out", False, 10**9)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(SourceError, match="not a readable torch checkpoint"):
        convert_checkpoint(tmp_path / "junk.pt", "hf", tmp_path / "out", False, 10**9)
    assert {p.name for p in tmp_path.iterdir()} == {"junk.pt"}


def test_a_storage_that_is_not_known_is_refused(folder: Path, tmp_path: Path) -> None:
    document = torch.load(_packed(folder, tmp_path), weights_only=True)
    document["config"]["quantization_config"]["storage"] = "folded"
    torch.save(document, tmp_path / "other.pt")
    with pytest.raises(SourceError, match="storage 'folded'"):
        convert_checkpoint(tmp_path / "other.pt", "hf", tmp_path / "back", False, 10**9)
    assert not (tmp_path / "back").exists()


def _packed(folder: Path, tmp_path: Path) -> Path:
    convert_checkpoint(folder, "pt", tmp_path / "low.pt", False, 10**9)
    return tmp_path / "low.pt"
