"""Compressing the demo model: what the files hold, and what transformers makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hisvd_cli.allocation.plan import Plan
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.layers.lowrank import LAYERS
from hisvd_cli.modeling.sources.weights import Weights
from hisvd_cli.modeling.whole_model import load_model
from hisvd_cli.utils.errors import OutputError, SourceError, StaleArtifactError
from hisvd_cli.utils.files.tensorfile import read_header, write_tensors
from tests.workbench import Bench, bench, compress_to, plan_at, tree

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@pytest.fixture(scope="module", params=LAYERS)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Bench:
    return bench(tmp_path_factory.mktemp("compress"), f"plan.storage={request.param}")


@pytest.fixture(scope="module")
def plan(made: Bench) -> Plan:
    return plan_at(made, 0.6)


@pytest.fixture(scope="module")
def folder(made: Bench, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("compressed") / "demo-0.6"
    compress_to(made, plan, target)
    return target


def test_bytes_on_disk_are_what_the_plan_says(made: Bench, plan: Plan, folder: Path) -> None:
    _, source, _ = made
    infos = open_checkpoint(folder).weights.infos
    low = {f"{name}.weight" for name in plan.ranks}
    outside = sum(
        info.nbytes
        for name, info in source.weights.infos.items()
        if name.removesuffix(".weight") not in {row.name for row in plan.sublayers}
    )
    dtype = source.weights.infos["model.layers.0.mlp.up_proj.weight"].dtype
    planned = outside + plan.kept_parameters * DTYPE_BYTES[dtype]
    # An index is one of the parameters that the plan counts, and takes four bytes.
    indices = [info for name, info in infos.items() if name.endswith(".weight_order")]
    assert len(indices) == (len(low) if plan.storage == "pivoted" else 0)
    planned += sum(info.nbytes // 4 * (4 - DTYPE_BYTES[dtype]) for info in indices)
    assert sum(info.nbytes for info in infos.values()) == planned
    file = folder / "model.safetensors"
    header_end = min(info.start for info in read_header(file).tensors.values())
    assert file.stat().st_size == planned + header_end
    assert all(f"{name}_u" in infos for name in low)


def product(weights: Weights, name: str) -> Tensor:
    """Return the weight that the factors of a sublayer on disk stand for."""
    v, u = (weights.read(f"{name}.{leaf}").float() for leaf in ("weight", "weight_u"))
    if f"{name}.weight_order" not in weights:
        return u @ v
    order = weights.read(f"{name}.weight_order").tolist()
    rows = [*v, *(u @ v)]
    return torch.stack([rows[i] for i in order])


def test_logits_equal_the_explicitly_multiplied_models(
    made: Bench, plan: Plan, folder: Path
) -> None:
    _, source, _ = made
    dense = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    weights = open_checkpoint(folder).weights
    for name in plan.ranks:
        linear = dense.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = product(weights, name)
    low = load_model(folder, torch.device("cpu"), torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(low(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_factors_are_the_best_of_their_rank_on_the_calibration_text(
    made: Bench, plan: Plan, folder: Path
) -> None:
    """The stored factors lose what the plan predicted, up to the rounding of their dtype."""
    _, source, calibration = made
    weights = open_checkpoint(folder).weights
    for row in plan.sublayers[:7]:
        moment = calibration.moments(row.layer)[row.name]
        weight = source.weights.read(f"{row.name}.weight").double()
        if row.dense or moment.side == "output":
            continue  # the error needs the input's moment
        difference = weight - product(weights, row.name).double()
        error = float((difference @ moment.matrix.double() * difference).sum())
        assert error == pytest.approx(row.loss, rel=0.05)


def test_shards_hold_the_same_tensors_as_one_file(
    made: Bench, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    compress_to(made, plan, tmp_path / "sharded", shard_bytes=600_000)
    one, many = open_checkpoint(folder), open_checkpoint(tmp_path / "sharded")
    assert len(many.weights.files) > 3
    assert all(path.stat().st_size < 900_000 for path in many.weights.files[1:])
    assert set(one.weights) == set(many.weights)
    for name in one.weights:
        assert torch.equal(one.weights.read(name), many.weights.read(name))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in many.weights.infos.values())
    load_model(tmp_path / "sharded", torch.device("cpu"), torch.float32)


def test_two_runs_write_the_same_bytes(
    made: Bench, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    compress_to(made, plan, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(folder)


def test_a_run_that_failed_goes_on_after_its_last_block(
    made: Bench, plan: Plan, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def count(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        if len(written) == limit:
            raise OutputError("The disk is full.", "Free some space.")
        written.append(path.name)
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr("hisvd_cli.compression.factorize.write_tensors", count)
    limit = 3
    with pytest.raises(OutputError):
        compress_to(made, plan, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    count_first = len(written)
    limit = 10**6
    compress_to(made, plan, tmp_path / "resumed")
    assert len(written) == len(set(written)), "a finished block was written again"
    assert count_first == 3
    assert tree(tmp_path / "resumed") == tree(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"resumed"}


def test_a_plan_for_another_model_is_refused(made: Bench, plan: Plan, tmp_path: Path) -> None:
    model = {**plan.provenance["model"], "fingerprint": "0" * 64, "name": "other"}
    stale = replace(plan, provenance={**plan.provenance, "model": model})
    with pytest.raises(StaleArtifactError, match="made for other"):
        compress_to(made, stale, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_ratio_one_is_the_dense_model(made: Bench, tmp_path: Path) -> None:
    _, source, _ = made
    compress_to(made, plan_at(made, 1.0), tmp_path / "full")
    weights = open_checkpoint(tmp_path / "full").weights
    assert set(weights) == set(source.weights)
    assert all(torch.equal(weights.read(n), source.weights.read(n)) for n in weights)


def test_a_missing_factor_is_an_error(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight_u"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="cannot load"):
        load_model(broken, torch.device("cpu"), torch.float32)
