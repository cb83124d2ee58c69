"""Updates without training, against the same sums taken from two whole models in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hisvd_cli.allocation.plan import load_plan
from hisvd_cli.compression.updates import CrossMoment, CrossSum, output_error, refitted, transfer
from hisvd_cli.compression.updating import Update
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.layers.lowrank import dense_product
from hisvd_cli.modeling.whole_model import load_model
from hisvd_cli.pipelines.calibration import ensure_calibration
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.compressing.updates import prepare_update
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.pipelines.forecasts.compression import forecast_compression
from hisvd_cli.pipelines.memory.bounds import check_update
from hisvd_cli.pipelines.named_source import named_source
from hisvd_cli.pipelines.samples import calibration_sample
from hisvd_cli.utils.errors import MemoryLimitError, OutputError, StaleArtifactError, UsageError
from hisvd_cli.utils.files.tensorfile import write_tensors
from hisvd_cli.utils.progress import Silent
from tests.models import load_dense, random_text
from tests.workbench import tree

MakeModel = Callable[[str], Path]
WINDOWS, LENGTH = 8, 64


def settings(model: Path, folder: Path, **flags: Any) -> Resolved:
    """Return settings that compress a tiny model by half, its text and calibration in a folder."""
    text = folder / "text.txt"
    text.write_text(random_text(1200), encoding="utf-8")
    given: dict[tuple[str, str], Any] = {
        ("model", "name"): str(model),
        ("plan", "ratio"): 0.5,
        ("plan", "min_rank_ratio"): 0.0,
        ("calibration", "dataset"): str(text),
        ("calibration", "samples"): WINDOWS,
        ("calibration", "seqlen"): LENGTH,
        ("calibration", "path"): str(folder / "calibration"),
        **{(SECTION.get(key, "compress"), key): value for key, value in flags.items()},
    }
    return resolve(given, environ={}, start=folder)


SECTION = {
    "storage": "plan",
    "samples": "calibration",
    "path": "calibration",
    "max_memory": "model",
}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return sublayer → the weight that its factors on disk stand for."""
    made = open_checkpoint(folder)
    return {
        name: dense_product(
            {
                key.rpartition(".")[2]: made.weights.read(key)
                for key in made.weights
                if key.rpartition(".")[0] == name and not key.endswith("bias")
            }
        )
        for name in made.ranks
    }


def compressed(resolved: Resolved, folder: Path) -> Path:
    compress_model(resolved, folder, None, False, Silent())
    return folder


def inputs(model: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return what each linear is given when the whole model reads ``tokens``: ``[T, n]``."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().flatten(0, -2).double()

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def root_of(gram: Tensor) -> Tensor:
    """Return R ``[n, n]`` with ``R Rᵀ = G``."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


@pytest.mark.parametrize(
    ("arch", "storage"),
    [("llama", "pair"), ("llama", "pivoted"), ("qwen2", "pair"), ("opt", "pair"), ("phi", "pair")],
)
def test_every_propagated_weight_is_the_best_for_the_inputs_that_it_gets(
    arch: str, storage: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    """By singular values of W* G′^½, W* from two whole models in memory."""
    damping = 0.01
    resolved = settings(
        tiny_model(arch), tmp_path, storage=storage, update="propagated", update_damping=damping
    )
    made = weights_of(compressed(resolved, tmp_path / "made"))
    ranks = load_plan(tmp_path / "made" / "plan.json").ranks
    tokens = tokens_of(resolved)
    dense, prefix = load_dense(tiny_model(arch)), load_dense(tiny_model(arch))
    wanted = inputs(dense, tokens, list(ranks))
    for name, x in wanted.items():  # in the order of running
        other = inputs(prefix, tokens, [name])[name]
        weight = dense.get_submodule(name).weight.detach().double()
        gram, cross = other.T @ other / len(x), x.T @ other / len(x)
        level = damping * gram.diagonal().mean() * torch.eye(len(gram))
        star = weight @ (cross + level) @ torch.linalg.inv(gram + level)
        lost = torch.linalg.svdvals(star @ root_of(gram)).square()
        error = float(((star - made[name].double()) @ root_of(gram)).square().sum())
        assert error == pytest.approx(float(lost[ranks[name] :].sum()), rel=1e-3), name
        prefix.get_submodule(name).weight.data = made[name].float()


def tokens_of(resolved: Resolved) -> Tensor:
    """Return the calibration tokens."""
    source = named_source(resolved)
    calibration, _ = ensure_calibration(resolved, source, Silent())
    return calibration_sample(resolved, source, calibration, Silent()).tokens


def test_a_closed_form_fits_u_to_the_dense_outputs(tiny_model: MakeModel, tmp_path: Path) -> None:
    """By a least-squares solver, from two whole models in memory; V is that of no update."""
    plain = compressed(settings(tiny_model("llama"), tmp_path), tmp_path / "plain")
    resolved = settings(tiny_model("llama"), tmp_path, update="closed-form", update_damping=0.0)
    folder = compressed(resolved, tmp_path / "made")
    made, tokens = weights_of(folder), tokens_of(resolved)
    before, after = open_checkpoint(plain).weights, open_checkpoint(folder).weights
    dense, prefix = load_dense(tiny_model("llama")), load_dense(tiny_model("llama"))
    for name, x in inputs(dense, tokens, list(made)).items():
        v = after.read(f"{name}.weight")
        assert torch.equal(v, before.read(f"{name}.weight"))
        other = inputs(prefix, tokens, [name])[name]
        target = x @ dense.get_submodule(name).weight.detach().double().T
        best = torch.linalg.lstsq(other @ v.double().T, target).solution
        error = (other @ made[name].double().T - target).square().sum()
        least = (other @ v.double().T @ best - target).square().sum()
        assert float(error) == pytest.approx(float(least), rel=1e-4), name
        prefix.get_submodule(name).weight.data = made[name].float()


def moments(width: int = 6, tokens: int = 40, noise: float = 0.3) -> CrossMoment:
    """Return C and G′ of random inputs and of the same with noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator)
    total = CrossSum(width, torch.device("cpu"))
    total.add(x, x + noise * torch.randn(tokens, width, generator=generator))
    return total.mean()


def test_no_weight_and_no_u_beside_the_fitted_one_is_better() -> None:
    found = moments()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    pair = u[:, :2], s[:2, None] * v[:2]
    fitted = refitted(weight, pair, found, 0.0)
    star = weight @ transfer(found, 0.0)
    for seed in range(5):
        shift = 1e-3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).double()
        assert output_error(weight, star + shift, found) > output_error(weight, star, found)
        moved = (fitted + shift[:, :2]) @ pair[1]
        assert output_error(weight, moved, found) > output_error(weight, fitted @ pair[1], found)
    assert output_error(weight, star, found) < output_error(weight, weight, found)


@pytest.mark.parametrize("damping", [1e12, math.inf])
def test_a_large_damping_updates_nothing(damping: float) -> None:
    found = moments()
    pair = torch.ones(4, 2), torch.ones(2, 6)
    torch.testing.assert_close(transfer(found, damping), torch.eye(6, dtype=torch.float64))
    fitted = refitted(torch.randn(4, 6), pair, found, damping)
    torch.testing.assert_close(fitted, pair[0].double())


def test_inputs_that_have_not_changed_update_nothing() -> None:
    torch.testing.assert_close(transfer(moments(noise=0.0), 0.1), torch.eye(6, dtype=torch.float64))


def test_a_channel_that_is_always_zero_does_no_harm() -> None:
    total = CrossSum(3, torch.device("cpu"))
    x = torch.randn(20, 3)
    x[:, 1] = 0
    total.add(x, x * 0.9)
    assert bool(transfer(total.mean(), 0.0).isfinite().all())
    nothing = CrossSum(2, torch.device("cpu"))
    nothing.add(torch.zeros(4, 2), torch.zeros(4, 2))
    assert torch.equal(transfer(nothing.mean(), 0.0), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("update", ["propagated", "closed-form"])
def test_a_run_that_failed_goes_on_to_the_same_bytes(
    update: str, tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = settings(tiny_model("llama"), tmp_path, update=update)
    whole = compressed(resolved, tmp_path / "whole")
    written: list[str] = []
    limit = 9

    def count(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if len(written) == limit:
            raise OutputError("The disk is full.", "Free some space.")
        written.append(path.name)
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr("hisvd_cli.compression.updating.write_tensors", count)
    with pytest.raises(OutputError):
        compressed(resolved, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    limit = 10**6
    compressed(resolved, tmp_path / "resumed")
    assert len(written) == len(set(written)) == len(open_checkpoint(whole).ranks)
    assert tree(tmp_path / "resumed") == tree(whole)
    record = json.loads((whole / "hisvd.json").read_text())
    assert record["update"]["method"] == update
    assert record["update"]["held_back"] == WINDOWS // 4


def test_without_an_update_nothing_is_recorded(tiny_model: MakeModel, tmp_path: Path) -> None:
    resolved = settings(tiny_model("llama"), tmp_path, update="none", update_damping=0.5)
    assert not [key for key in resolved.recorded()["compress"] if key.startswith("update")]
    plain = settings(tiny_model("llama"), tmp_path)
    assert resolved.recorded() == plain.recorded()


METHODS = ["svd", "asvd", "fwsvd", "gfwsvd", "fisher", "randomized"]


@pytest.mark.parametrize("decomposer", METHODS)
def test_every_decomposer_comes_nearer_to_the_dense_model(
    decomposer: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    """By the mean square of what differs in the logits, on the calibration text."""
    tokens, dense = None, load_dense(tiny_model("llama"))
    errors = {}
    for update in ("none", "propagated"):
        resolved = settings(
            tiny_model("llama"), tmp_path, decomposer=decomposer, update=update, storage="pivoted"
        )
        folder = compressed(resolved, tmp_path / update)
        tokens = tokens_of(resolved) if tokens is None else tokens
        made = load_model(folder, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            errors[update] = float((made(tokens).logits - dense(tokens).logits).square().mean())
    assert errors["propagated"] < errors["none"]


def test_one_file_is_updated_too(tiny_model: MakeModel, tmp_path: Path) -> None:
    resolved = settings(tiny_model("llama"), tmp_path, update="propagated")
    folder = compressed(resolved, tmp_path / "folder")
    compressed(resolved, tmp_path / "one.pt")
    single = torch.load(tmp_path / "one.pt", weights_only=True)
    weights = open_checkpoint(folder).weights
    state = next(v for v in single.values() if isinstance(v, dict) and set(weights) <= set(v))
    assert all(torch.equal(state[name], weights.read(name)) for name in weights)


def test_states_in_a_file_change_no_byte(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = settings(tiny_model("opt"), tmp_path, update="closed-form")
    compressed(resolved, tmp_path / "memory")

    def in_a_file(*given: Any) -> Update | None:
        update = prepare_update(*given)
        return update and replace(update, place="file")

    monkeypatch.setattr("hisvd_cli.pipelines.compressing.first_stage.prepare_update", in_a_file)
    compressed(resolved, tmp_path / "file")
    assert tree(tmp_path / "file") == tree(tmp_path / "memory")


def test_a_forecast_counts_the_second_model(tiny_model: MakeModel, tmp_path: Path) -> None:
    peaks = {}
    for update in ("none", "propagated"):
        resolved = settings(tiny_model("llama"), tmp_path, update=update)
        found = forecast_compression(resolved, tmp_path / "made", None, False, Silent())
        peaks[update] = found["peak_memory_bytes"]
    assert peaks["propagated"] > peaks["none"]
    tight = settings(tiny_model("llama"), tmp_path, update="propagated", max_memory="400MB")
    with pytest.raises(MemoryLimitError, match="An update"):
        check_update(tight, named_source(tight))


def test_one_window_cannot_choose_a_damping(tiny_model: MakeModel, tmp_path: Path) -> None:
    resolved = settings(tiny_model("llama"), tmp_path, update="propagated", samples=1)
    with pytest.raises(UsageError, match="one window"):
        compressed(resolved, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_plan_for_another_model_is_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    other = settings(tiny_model("qwen2"), tmp_path)
    plan = compressed(other, tmp_path / "other") / "plan.json"
    given = settings(tiny_model("llama"), tmp_path, update="propagated", path=str(tmp_path / "own"))
    bare = replace(given, origins={k: v for k, v in given.origins.items() if k[0] != "plan"})
    with pytest.raises(StaleArtifactError, match="made for"):
        compress_model(bare, tmp_path / "made", plan, False, Silent())


@pytest.mark.parametrize(("key", "value"), [("update", "sideways"), ("update_damping", -0.1)])
def test_settings_that_mean_nothing_are_refused(
    key: str, value: object, tiny_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=key.replace("_", ".")):
        settings(tiny_model("llama"), tmp_path, **{key: value})
