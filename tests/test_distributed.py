"""Several processes on one model: the same results as one, and one message when one is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hisvd_cli.calibration.statistics_files import block_file
from hisvd_cli.modeling.hidden_states import StatesHome
from hisvd_cli.modeling.rows import Checkpoints, RowFiles
from hisvd_cli.utils.distributed import World, own_gpu, share_by_cost
from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.files.artifact import partial_path
from hisvd_cli.utils.files.tensorfile import AGAIN
from tests.cli_helpers import digests, environment, succeed, text_file, two_lines
from tests.models import save_model
from tests.workbench import tree

WORKER = """
import os, signal
from hisvd_cli.compression import factorize as compress
from hisvd_cli.cli.app import main
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.utils.errors import NumericalError

advance = BlockWalk.advance

def die(self, index):
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, index)

def fail(*_):
    raise NumericalError("A sublayer is bad.", "Do something.")

how = os.environ["HOW"]
if (how, os.environ["RANK"]) == ("killed", "1"):
    BlockWalk.advance = die
if (how, os.environ["RANK"]) == ("failing", "1"):
    compress.PartBuilder.read = fail
main()
"""
RUNS = {"whole": (2, 5), "killed": (2, 5), "failing": (2, 1)}
"""How → processes and sequences: with two for one, the last has none."""
Runs = dict[str, "subprocess.CompletedProcess[str]"]


def command(folder: Path, how: str, samples: int) -> list[str]:
    """Return what a run is started with: gradients of both kinds, and ranks and factors by them."""
    return [
        *("compress", "--model", str(folder / "model"), "--dataset", str(folder / "text-0.txt")),
        *("--samples", str(samples), "--seqlen", "24", "--batch", "2", "--weight-gradients"),
        *("--allocator", "waterfill", "--metric", "held-out", "--decomposer", "fisher"),
        *("--ratio", "0.6", "--no-evaluate", "--json"),
        *("--calibration", str(folder / f"{how}-calibration"), "--output", str(folder / how)),
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    save_model("llama", folder / "model")
    text_file(folder, 600)
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    for how, samples in (("one", 5), ("short", 1)):
        succeed(*command(folder, how, samples), env={"HISVD_CACHE": str(folder / "cache")})
    return folder


@pytest.fixture(scope="module")
def runs(home: Path) -> Runs:
    """Start all runs beside each other: most of their time they import torch."""
    started = {}
    for how, (size, samples) in RUNS.items():
        env = {"HISVD_CACHE": str(home / "cache"), "GLOO_SOCKET_IFNAME": "lo", "HOW": how}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [f"--nproc-per-node={size}", "worker.py", *command(home, how, samples)]
        started[how] = subprocess.Popen(
            [*launch, *words],
            cwd=home,
            env=environment({**env, "PYTHONPATH": os.getcwd()}),  # noqa: PTH109
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    done = {}
    for how, process in started.items():
        out, err = process.communicate(timeout=300)
        done[how] = subprocess.CompletedProcess(how, process.returncode, out, err)
    return done


def of_hisvd(stderr: str) -> str:
    """Return what stderr holds of hisvd: what torchrun says of its workers follows it."""
    kept = [line for line in stderr.splitlines() if line.startswith(("Error: ", "Hint: "))]
    assert "Internal error" not in stderr
    return "\n".join(kept)


def assert_near(one: Path, other: Path, tolerance: float) -> None:
    """Compare all tensors of all files of two folders."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*.safetensors"))
    for name in names:
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            error = float((found[key] - tensor).abs().max())
            assert error <= tolerance * float(tensor.abs().max()), f"{name} {key}"


def products(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {
        name: tensors[f"{name}_u"] @ tensor if f"{name}_u" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_u")
    }


@pytest.mark.slow
def test_several_processes_make_what_one_makes(home: Path, runs: Runs) -> None:
    done = runs["whole"]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(home / "whole")  # printed once
    assert done.stderr.count("Calibrating blocks") == 1
    assert_near(home / "one-calibration", home / "whole-calibration", 1e-4)
    plans = [json.loads((home / how / "plan.json").read_text()) for how in ("one", "whole")]
    ranks = [[s["rank"] for s in plan["sublayers"]] for plan in plans]
    assert ranks[0] == ranks[1]
    expected, found = products(home / "one"), products(home / "whole")
    assert expected.keys() == found.keys()
    for name, product in expected.items():
        assert torch.allclose(found[name], product, atol=1e-4), name
    assert list(tree(home / "one")) == list(tree(home / "whole"))
    assert not list(home.glob(".whole*"))


@pytest.mark.slow
def test_a_killed_process_is_named_once_and_one_process_ends_its_work(
    home: Path, runs: Runs
) -> None:
    done = runs["killed"]
    assert done.returncode == 1
    assert done.stdout == ""
    message, hint = two_lines(of_hisvd(done.stderr))
    assert "Rank 1 of 2" in message
    assert "resumes after the last completed block" in hint
    left = partial_path(home / "killed-calibration")
    times = {i: (left / block_file(i)).stat().st_mtime_ns for i in (0, 1)}
    assert not (home / "killed-calibration").exists()
    succeed(*command(home, "killed", 5), env={"HISVD_CACHE": str(home / "cache")})
    for i, time in times.items():
        assert (home / "killed-calibration" / block_file(i)).stat().st_mtime_ns == time
    assert_near(home / "one-calibration", home / "killed-calibration", 1e-4)
    for name, product in products(home / "one").items():
        assert torch.allclose(products(home / "killed")[name], product, atol=1e-4), name
    assert not list(home.glob(".killed*"))


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_as_it_is(home: Path, runs: Runs) -> None:
    done = runs["failing"]
    assert done.returncode == 1
    assert two_lines(of_hisvd(done.stderr)) == ("A sublayer is bad.", "Do something.")
    assert_near(home / "short-calibration", home / "failing-calibration", 1e-4)
    succeed(*command(home, "failing", 1), env={"HISVD_CACHE": str(home / "cache")})
    assert digests(home / "failing").keys() == digests(home / "short").keys()


def test_one_process_does_all_by_itself() -> None:
    alone = World()
    total = torch.ones(2)
    alone.add_up(total)
    alone.wait()
    assert alone.first
    assert list(alone.share(5)) == [0, 1, 2, 3, 4]
    assert alone.agreed(lambda: 1) == alone.after_first(lambda: 1) == 1
    assert alone.gathered(3) == [3]
    assert total.tolist() == [1, 1]


@pytest.mark.parametrize(("count", "size"), [(5, 2), (2, 3), (8, 8), (7, 3), (0, 2)])
def test_shares_cover_everything_once(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares))


def test_work_is_dealt_by_cost() -> None:
    block = [("k", 1), ("v", 1), ("q", 4), ("up", 9)]
    owner = share_by_cost([block, [("next", 3)]], 2)
    assert owner == {"up": 0, "q": 1, "k": 1, "v": 1, "next": 1}
    equal = share_by_cost([[(f"{i}.{j}", 5) for j in range(7)] for i in range(8)], 4)
    assert [list(equal.values()).count(rank) for rank in range(4)] == [14] * 4


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_gpu("cuda:1") == "cuda:1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="cuda:1"):
        own_gpu("cuda:1")
    assert own_gpu("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_gpu("auto") == own_gpu("cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="more processes than GPUs") as caught:
        own_gpu("auto")
    assert "--nproc-per-node 1" in caught.value.hint


def test_rows_are_read_from_files_of_any_processes(tmp_path: Path) -> None:
    whole, home = torch.arange(24.0).reshape(8, 3), StatesHome(torch.device("cpu"))
    state = Checkpoints(tmp_path, "hidden", 8)
    for first, end in ((0, 3), (2, 5), (5, 8)):
        state.at(4).keep(first, whole[first:end], home)
    state.at(7).keep(0, whole[:5], home)
    assert state.blocks() == [4]
    for start in range(8):
        for end in range(start + 1, 9):
            assert torch.equal(state.at(4).read(start, end), whole[start:end])
    with pytest.raises(SourceError, match="lacks rows 4 to 6 of hidden-00007") as caught:
        state.at(7).read(4, 6)
    assert caught.value.hint == AGAIN
    RowFiles(tmp_path, "none").keep(0, whole[:0], home)
    state.remove(but=4)
    assert state.blocks() == [4]
    assert len(list(tmp_path.iterdir())) == 3
    state.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_of_a_run_that_ended_well_is_at_work_when_python_ends() -> None:
    script = """
        import threading
        from hisvd_cli.utils.watchdog import guarding
        for _ in range(2):
            with guarding(print):
                assert threading.active_count() == 2
            assert threading.active_count() == 1
    """
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)], env=environment(env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
