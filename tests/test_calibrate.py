"""Moments against activations of the whole model, and runs that are stopped and go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hisvd_cli.calibration import calibrate as module
from hisvd_cli.calibration.calibrate import STATE_SECONDS, calibrate
from hisvd_cli.calibration.collector import Collector
from hisvd_cli.calibration.statistics_files import block_file
from hisvd_cli.calibration.store import (
    MANIFEST,
    Calibration,
    Sample,
    calibration_key,
    open_calibration,
)
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import (
    NumericalError,
    OutputError,
    SourceError,
    StaleArtifactError,
    UnsupportedModelError,
)
from hisvd_cli.utils.files.artifact import partial_path
from hisvd_cli.utils.progress import Silent
from tests.conftest import CACHE, MakeModel
from tests.models import CONFIGS, load_dense, names, random_tokens

CPU = torch.device("cpu")
TOKENS = random_tokens(5, 24)
SAMPLE = Sample(TOKENS, "random", "file", "0" * 64, seed=0)
Matrix = npt.NDArray[np.float64]


def run(
    model: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    state_seconds: float = STATE_SECONDS,
    sample: Sample = SAMPLE,
) -> Calibration:
    return calibrate(
        open_source(str(model)),
        sample,
        folder,
        device=CPU,
        dtype=dtype,
        batch=2,
        settings={"any": {"thing": 1}},
        reporter=Silent(),
        state_seconds=state_seconds,
    )


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def made(folder: Path) -> list[str]:
    """Return what lies in a test's folder beside hisvd's cache, hidden files too."""
    return [name for name in names(folder) if name != CACHE]


# What is measured


def dense_moments(model: Any) -> dict[str, tuple[Matrix, Matrix]]:
    """Return name → (E[x xᵀ], E[y yᵀ] without the bias) of every linear of the blocks."""
    seen: dict[str, list[Matrix]] = {}
    linears = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".layers." in name
    }
    for name, linear in linears.items():

        def watch(_m: object, args: tuple[Tensor, ...], _out: object, name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].flatten(0, -2).double().numpy())

        linear.register_forward_hook(watch)
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    moments = {}
    for name, parts in seen.items():
        x = np.concatenate(parts)
        y = x @ linears[name].weight.detach().double().numpy().T
        moments[name] = (x.T @ x / len(x), y.T @ y / len(y))
    return moments


@pytest.mark.parametrize("arch", CONFIGS)
def test_moments_are_those_of_the_whole_model(
    arch: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tiny_model(arch)
    calibration = run(folder, tmp_path / "calibration")
    model = load_dense(folder)
    expected = dense_moments(model)
    found = {}
    for layer in range(model.config.num_hidden_layers):
        found.update(calibration.moments(layer))
    assert found.keys() == expected.keys()
    for name, moment in found.items():
        reference = expected[name][0 if moment.side == "input" else 1]
        matrix = moment.matrix.double().numpy()
        assert np.abs(matrix - reference).max() <= 2e-6 * np.abs(reference).max(), name
        assert np.abs(reference).max() > 1e-3


def sides(calibration: Calibration) -> dict[str, str]:
    return {
        name.partition("layers.0.")[2]: moment.side
        for name, moment in calibration.moments(0).items()
    }


@pytest.mark.parametrize(
    ("arch", "outputs"),
    [
        ("llama", {"mlp.down_proj"}),  # 32 < 48
        ("opt", {"fc2"}),
        ("gemma", {"self_attn.o_proj", "mlp.down_proj"}),  # attention is 64 wide
        ("phi", {"mlp.fc2"}),
        ("phi3", {"mlp.down_proj"}),
    ],
)
def test_the_smaller_side_is_kept(
    arch: str, outputs: set[str], tiny_model: MakeModel, tmp_path: Path
) -> None:
    found = sides(run(tiny_model(arch), tmp_path / "calibration"))
    assert {name for name, side in found.items() if side == "output"} == outputs


def shared(calibration: Calibration) -> set[frozenset[str]]:
    """Return which sublayers of the first block have one moment in common."""
    groups: dict[int, set[str]] = {}
    moments = calibration.moments(0)  # held, so that ids stay different
    for name, moment in moments.items():
        groups.setdefault(id(moment), set()).add(name.rpartition(".")[2])
    return {frozenset(names) for names in groups.values() if len(names) > 1}


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj"}]),
        ("phi", [{"q_proj", "k_proj", "v_proj", "fc1"}]),  # attention and mlp side by side
        ("phi3", []),
    ],
)
def test_shared_inputs_are_kept_once(
    arch: str, expected: list[set[str]], tiny_model: MakeModel, tmp_path: Path
) -> None:
    calibration = run(tiny_model(arch), tmp_path / "calibration")
    assert shared(calibration) == {frozenset(names) for names in expected}
    stored = load_file(calibration.folder / block_file(0))
    moments = [name for name in stored if not name.endswith(".channels")]
    assert len(moments) == len({id(m) for m in calibration.moments(0).values()})


def collect(linears: dict[str, nn.Linear], forward: Callable[[], object]) -> Collector:
    collector = Collector(linears, CPU)
    with collector.grouping() as groups:
        forward()
    collector.choose_sides(groups)
    with collector.summing():
        forward()
    return collector


def test_a_group_takes_the_side_with_fewer_entries() -> None:
    narrow = {name: nn.Linear(10, 6) for name in ("a", "b")}  # 36 < 100, and 72 < 100
    x = torch.randn(3, 10)
    found = collect(narrow, lambda: [m(x) for m in narrow.values()])
    assert found.owners == {"a": ("a.output", "a.channels"), "b": ("b.output", "a.channels")}
    three = {**narrow, "c": nn.Linear(10, 6)}  # 108 > 100
    found = collect(three, lambda: [m(x) for m in three.values()])
    assert found.owners == dict.fromkeys("abc", ("a.input", "a.channels"))
    equal = {"a": nn.Linear(10, 10)}
    assert collect(equal, lambda: equal["a"](x)).owners == {"a": ("a.input", "a.channels")}


def test_only_the_very_same_tensor_is_shared() -> None:
    linears = {name: nn.Linear(4, 4) for name in "ab"}
    x = torch.randn(3, 4)
    found = collect(linears, lambda: (linears["a"](x), linears["b"](x.clone())))
    assert found.owners == {name: (f"{name}.input", f"{name}.channels") for name in "ab"}


def test_later_changes_in_place_are_not_seen() -> None:
    linears = {"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(8, 4, bias=False)}
    x, z = torch.randn(3, 4), torch.randn(3, 8)
    x0, z0 = x.clone(), z.clone()

    def forward() -> None:
        x.copy_(x0)
        z.copy_(z0)
        linears["a"](x)
        linears["b"](z).mul_(5)
        x.mul_(3)

    with torch.no_grad():
        found = collect(linears, forward)
        y = linears["b"](z0)
    torch.testing.assert_close(found.sums["a.input"].mean(), x0.T @ x0 / 3)
    torch.testing.assert_close(found.sums["b.output"].mean(), y.T @ y / 3)


def test_hooks_are_taken_away_again() -> None:
    linear = nn.Linear(2, 2)
    collector = Collector({"a": linear}, CPU)
    with pytest.raises(RuntimeError, match="stop"), collector.grouping():
        raise RuntimeError("stop")
    assert not linear._forward_hooks


def test_bfloat16_is_near(tiny_model: MakeModel, tmp_path: Path) -> None:
    found = run(tiny_model("llama"), tmp_path / "bf16", torch.bfloat16)
    exact = run(tiny_model("llama"), tmp_path / "f32")
    assert found.manifest["dtype"] == "bfloat16"
    assert found.key != exact.key
    for name, moment in found.moments(2).items():
        reference = exact.moments(2)[name].matrix
        assert moment.matrix.dtype == torch.float32
        assert (moment.matrix - reference).norm() < 0.05 * reference.norm()


# What is recorded


def test_the_manifest_records_what_the_moments_depend_on(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    source = open_source(str(tiny_model("llama")))
    calibration = run(tiny_model("llama"), tmp_path / "calibration")
    manifest = json.loads((tmp_path / "calibration" / MANIFEST).read_text())
    assert manifest == calibration.manifest
    assert manifest["model"]["fingerprint"] == source.fingerprint
    assert manifest["data"]["tokens"] == TOKENS.numel()
    assert manifest["data"]["tokens_sha256"] == SAMPLE.key
    assert manifest["settings"] == {"any": {"thing": 1}}
    assert set(manifest["versions"]) == {"hisvd", "torch", "transformers"}
    expected = {MANIFEST, *(block_file(i) for i in range(3))}
    assert set(hashes(tmp_path / "calibration")) == expected
    assert made(tmp_path) == ["calibration"]


def test_the_key_names_model_tokens_and_dtype(tiny_model: MakeModel) -> None:
    def key(arch: str, tokens: Tensor, dtype: torch.dtype) -> str:
        sample = Sample(tokens, "x", "y", "z", 0)
        return calibration_key(open_source(str(tiny_model(arch))), sample, dtype)

    f32 = torch.float32
    keys = {
        key("llama", TOKENS, f32),
        key("qwen2", TOKENS, f32),
        key("llama", TOKENS + 1, f32),
        key("llama", TOKENS.view(10, 12), f32),
        key("llama", TOKENS, torch.bfloat16),
    }
    assert len(keys) == 5
    assert key("llama", TOKENS.clone(), f32) in keys


# What goes on after a stop


class StopError(Exception):
    """Plays an interruption."""


def stop(*_: object) -> None:
    raise StopError


def stop_before(block: int, patch: pytest.MonkeyPatch) -> None:
    real = BlockWalk.load

    def load(self: BlockWalk, index: int) -> nn.Module:
        if index == block:
            raise StopError
        return real(self, index)

    patch.setattr(BlockWalk, "load", load)


def blocks_loaded(patch: pytest.MonkeyPatch) -> list[int]:
    loaded: list[int] = []
    real = BlockWalk.load

    def load(self: BlockWalk, index: int) -> nn.Module:
        loaded.append(index)
        return real(self, index)

    patch.setattr(BlockWalk, "load", load)
    return loaded


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3_text"])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("state_seconds", [0.0, STATE_SECONDS])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    arch: str,
    block: int,
    state_seconds: float,
    tiny_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(tiny_model(arch), tmp_path / "whole").folder
    target = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_before(block, patch)
        with pytest.raises(StopError):
            run(tiny_model(arch), target, state_seconds=state_seconds)
    assert not target.exists()
    left = {path.name for path in partial_path(target).iterdir()}
    assert {block_file(i) for i in range(block)} == {name for name in left if "block" in name}
    with monkeypatch.context() as patch:
        loaded = blocks_loaded(patch)
        run(tiny_model(arch), target, state_seconds=state_seconds)
    first = block if state_seconds == 0 else 0
    assert loaded == list(range(first, CONFIGS[arch][1]["num_hidden_layers"]))
    assert hashes(target) == hashes(whole)
    assert made(tmp_path) == ["stopped", "whole"]


def test_a_stop_behind_the_last_block_repeats_none(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model("llama"), tmp_path / "whole").folder
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", stop)
        with pytest.raises(StopError):
            run(tiny_model("llama"), tmp_path / "stopped", state_seconds=0)
    with monkeypatch.context() as patch:
        loaded = blocks_loaded(patch)
        patch.setattr(BlockWalk, "embed", lambda *_: pytest.fail("nothing is left to walk"))
        run(tiny_model("llama"), tmp_path / "stopped")
    assert loaded == []
    assert hashes(tmp_path / "stopped") == hashes(whole)


def test_a_stored_state_that_is_damaged_is_made_again(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model("llama"), tmp_path / "whole").folder
    with monkeypatch.context() as patch:
        stop_before(2, patch)
        with pytest.raises(StopError):
            run(tiny_model("llama"), tmp_path / "x", state_seconds=0)
    (state,) = partial_path(tmp_path / "x").glob("hidden-*")
    state.write_bytes(state.read_bytes()[:-1])
    run(tiny_model("llama"), tmp_path / "x")
    assert hashes(tmp_path / "x") == hashes(whole)


KILLED = """
import sys, time
from pathlib import Path
from hisvd_cli.calibration import calibrate
from hisvd_cli.modeling.block_walk import BlockWalk
from tests.test_calibrate import run

stop, real = int(sys.argv[3]), BlockWalk.advance

def advance(self, index):
    if index == stop:
        print("ready", flush=True)
        time.sleep(60)
    real(self, index)

BlockWalk.advance = advance
run(Path(sys.argv[1]), Path(sys.argv[2]), state_seconds=float(sys.argv[4]))
"""


@pytest.mark.parametrize(
    "state_seconds", [0.0, pytest.param(STATE_SECONDS, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    state_seconds: float, tiny_model: MakeModel, tmp_path: Path
) -> None:
    model, target = tiny_model("llama"), tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(model), str(target), "2", str(state_seconds)]
    root = str(Path(__file__).parents[1])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(OutputError, match="Another hisvd run is writing"):
            run(model, target)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert (partial_path(target) / block_file(1)).is_file()
    run(model, target, state_seconds=state_seconds)
    assert hashes(target) == hashes(run(model, tmp_path / "whole").folder)
    assert made(tmp_path) == ["killed", "whole"]


def test_a_kill_while_a_file_is_written_leaves_nothing_of_it(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is written seldom: a rerun may never write it again, and must not ship its half."""
    with monkeypatch.context() as patch:
        stop_before(1, patch)
        with pytest.raises(StopError):
            run(tiny_model("llama"), tmp_path / "x")
    (partial_path(tmp_path / "x") / ".hidden-00001.000000-000005.safetensors.4711.tmp").write_bytes(
        b"half"
    )
    run(tiny_model("llama"), tmp_path / "x")
    assert hashes(tmp_path / "x") == hashes(run(tiny_model("llama"), tmp_path / "whole").folder)


def test_other_tokens_start_afresh(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_before(2, patch)
        with pytest.raises(StopError):
            run(tiny_model("llama"), tmp_path / "x", state_seconds=0)
    other = Sample(random_tokens(5, 24, seed=1), "random", "file", "0" * 64, seed=1)
    run(tiny_model("llama"), tmp_path / "x", sample=other)
    whole = run(tiny_model("llama"), tmp_path / "whole", sample=other)
    assert hashes(tmp_path / "x") == hashes(whole.folder)


# What goes wrong


def edited(model: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Return a copy of a model with changed tensors."""
    shutil.copytree(model, target)
    state = load_file(target / "model.safetensors")
    edit(state)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_nan_are_named(name: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    def poison(state: dict[str, Tensor]) -> None:
        state[name].view(-1)[3] = float("nan")

    model = edited(tiny_model("llama"), tmp_path / "model", poison)
    with pytest.raises(NumericalError, match=f"{name} in model.safetensors contains 1 values"):
        run(model, tmp_path / "calibration")
    assert not (tmp_path / "calibration").exists()


def test_activations_that_overflow(tiny_model: MakeModel, tmp_path: Path) -> None:
    def blow_up(state: dict[str, Tensor]) -> None:
        for name in ("up_proj", "down_proj"):
            state[f"model.layers.1.mlp.{name}.weight"] *= 1e4

    model = edited(tiny_model("llama"), tmp_path / "model", blow_up)
    run(model, tmp_path / "wide enough")
    with pytest.raises(NumericalError, match="output of block 1 is NaN or infinite") as caught:
        run(model, tmp_path / "calibration", torch.float16)
    assert "`model.dtype`" in caught.value.hint
    assert not (tmp_path / "calibration").exists()


def test_moments_that_overflow(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Finite activations whose squares are not."""

    def blow_up(state: dict[str, Tensor]) -> None:
        state["model.layers.1.post_attention_layernorm.weight"] *= 1e20
        state["model.layers.1.mlp.gate_proj.weight"].zero_()
        state["model.layers.1.mlp.up_proj.weight"] *= 1e-20

    model = edited(tiny_model("llama"), tmp_path / "model", blow_up)
    expected = r"activations of model\.layers\.1\.mlp\.gate_proj are NaN or infinite"
    with pytest.raises(NumericalError, match=expected):
        run(model, tmp_path / "calibration")
    assert not (tmp_path / "calibration").exists()


def test_a_truncated_shard_is_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    load_dense(tiny_model("llama")).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SourceError, match=shard.name):
        run(tmp_path / "model", tmp_path / "calibration")
    assert made(tmp_path) == ["model"]


def test_a_full_disk(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    written = 0

    def fill_up(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_up)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            run(tiny_model("llama"), tmp_path / "x", state_seconds=0)
    assert "Free some space" in caught.value.hint
    assert not (tmp_path / "x").exists()
    for path in partial_path(tmp_path / "x").iterdir():
        assert path.suffix == ".safetensors"
        load_file(path)  # whole
    run(tiny_model("llama"), tmp_path / "x", state_seconds=0)
    assert hashes(tmp_path / "x") == hashes(run(tiny_model("llama"), tmp_path / "whole").folder)


def test_a_linear_that_is_never_run(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collector, "_choose_side", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"q_proj is not used in the forward pass"):
        run(tiny_model("llama"), tmp_path / "calibration")


def test_a_calibration_of_another_model_is_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "calibration")
    open_calibration(tmp_path / "calibration", open_source(str(tiny_model("llama"))))
    open_calibration(tmp_path / "calibration")
    with pytest.raises(
        StaleArtifactError, match=r"is the calibration of .*llama, not of"
    ) as caught:
        open_calibration(tmp_path / "calibration", open_source(str(tiny_model("llama_untied"))))
    assert "Calibrate this model" in caught.value.hint


def test_a_calibration_in_another_format_is_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "x")
    path = tmp_path / "x" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(StaleArtifactError, match="format 99"):
        open_calibration(tmp_path / "x")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"model": {}, "format_version": 1}'])
def test_folders_that_hold_no_calibration(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(SourceError, match="is not a calibration"):
        open_calibration(tmp_path)


def test_a_block_that_is_missing_or_damaged(tiny_model: MakeModel, tmp_path: Path) -> None:
    calibration = run(tiny_model("llama"), tmp_path / "x")
    path = calibration.folder / block_file(1)
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(SourceError, match=block_file(1)) as caught:
            calibration.moments(1)
        assert caught.value.hint == "Calibrate again."
        path.unlink(missing_ok=True)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(SourceError, match="contains no moments"):
        calibration.moments(1)
    calibration.moments(0)
