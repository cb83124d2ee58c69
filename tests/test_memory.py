"""A bound on memory: how it is written, what it decides, and that it is kept under a hard limit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hisvd_cli.calibration.calibrate import calibrate
from hisvd_cli.calibration.gradients import measure_gradients
from hisvd_cli.calibration.store import Calibration, Sample
from hisvd_cli.calibration.workload import IMPORTS_BYTES, Peak, Workload, calibration_peak
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.hidden_states import Place, StatesHome
from hisvd_cli.modeling.rows import RowFiles
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.structure.sublayers import Sublayer
from hisvd_cli.pipelines.memory.placement import fit
from hisvd_cli.utils.errors import MemoryLimitError, OutputError, SourceError
from hisvd_cli.utils.files.artifact import partial_path
from hisvd_cli.utils.files.tensorfile import AGAIN, write_tensors
from hisvd_cli.utils.progress import Silent
from hisvd_cli.utils.quantities import MemoryBounds, parse_bounds
from tests.cli_helpers import (
    QUICK,
    as_json,
    digests,
    environment,
    fail,
    succeed,
    text_file,
    two_lines,
)
from tests.conftest import MakeModel
from tests.models import VOCABULARY, random_text, random_tokens, randomize, save_tokenizer


class StopError(Exception):
    """Plays an interruption."""


CPU = torch.device("cpu")
GB = 10**9


# How a bound is written


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("3GB", MemoryBounds(3 * GB, {})),
        ("1.5 gib", MemoryBounds(3 * 2**29, {})),
        ("cpu=512MiB", MemoryBounds(2**29, {})),
        ("cuda=20GB", MemoryBounds(None, {"cuda": 20 * GB})),
        ("cpu=8GB, cuda=20GB", MemoryBounds(8 * GB, {"cuda": 20 * GB})),
        ("8GB,cuda=20GB", MemoryBounds(8 * GB, {"cuda": 20 * GB})),
    ],
)
def test_sizes(text: str, bounds: MemoryBounds) -> None:
    assert parse_bounds(text) == bounds


@pytest.mark.parametrize(
    "text",
    ["3", "GB", "-3GB", "0GB", "3XB", "80%", "tpu=3GB", "3GB,4GB", "cuda=", "cuda=1GB,cuda=2GB"],
)
def test_no_sizes(text: str) -> None:
    message, _ = fail("calibrate", *QUICK, "--max-memory", text, code=2)
    assert message.startswith(f"--max-memory {text} must be a size such as 3GB")


def test_a_bound_of_a_device_that_is_not_used(here: Path) -> None:
    words = ("calibrate", *QUICK, "--device", "cpu", "--max-memory", "cuda=3GB")
    message, hint = fail(*words, code=2)
    assert message == "--max-memory cuda=3GB limits cuda, but blocks run on cpu."
    assert hint == "Leave out cuda=, or use --device cuda."
    assert not any(here.iterdir())


# What it decides


def work(device: str = "cpu", batch: int = 8, samples: int = 512) -> Workload:
    shapes = {"q": (64, 64), "down": (64, 160)}
    sublayers = [Sublayer(f"layers.{i}.{n}", i, n, s) for i in range(2) for n, s in shapes.items()]
    return Workload(sublayers, 10_000, 64, samples, 512, batch, torch.float32, torch.device(device))


def chosen(found: Workload) -> tuple[Place, int]:
    return found.place, found.batch


def test_states_move_away_and_batches_shrink_no_more_than_they_must() -> None:
    whole = calibration_peak(fit(work(), MemoryBounds(GB, {}), calibration_peak))
    states = work().states_bytes
    pass_ = (
        whole.host
        - calibration_peak(fit(work(batch=4), MemoryBounds(GB, {}), calibration_peak)).host
    )

    def at(bound: int) -> tuple[Place, int]:
        return chosen(fit(work(), MemoryBounds(bound, {}), calibration_peak))

    assert at(whole.host) == ("host", 8)
    assert at(whole.host - 1) == ("file", 8)
    assert at(whole.host - states) == ("file", 4)
    assert at(whole.host - states - pass_) == ("file", 2)


def test_states_leave_a_gpu_for_the_host_and_the_host_for_a_file() -> None:
    def at(**bounds: Any) -> tuple[Place, int]:
        found = fit(work("cuda"), MemoryBounds(**bounds), calibration_peak)
        return chosen(found)

    whole, states = calibration_peak(work("cuda")), work().states_bytes
    inside = {"cuda": whole.device - 1}
    assert at(host=None, devices={"cuda": whole.device}) == ("device", 8)
    assert at(host=None, devices=inside) == ("host", 8)
    assert at(host=whole.host + states, devices=inside) == ("host", 8)
    assert at(host=whole.host + states - 1, devices=inside) == ("file", 8)


def test_a_bound_that_nothing_keeps_to_names_the_levers() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        fit(work(), MemoryBounds(10**8, {}), calibration_peak)
    assert re.search(
        r"takes 4\d\dMB of cpu memory, above `model.max_memory=cpu=100MB`", caught.value.message
    )
    for lever in (
        "model.max_memory",
        "calibration.seqlen",
        "calibration.batch",
        "calibration.samples",
    ):
        assert lever in caught.value.hint
    with pytest.raises(MemoryLimitError, match="of cuda memory"):
        fit(work("cuda"), MemoryBounds(None, {"cuda": 10**8}), calibration_peak)


def test_the_peak_grows_with_what_is_held() -> None:
    one, several, many = (
        calibration_peak(work(batch=b, samples=s)).host for b, s in ((1, 8), (8, 8), (8, 512))
    )
    assert one < several
    assert many - several == work(samples=512).states_bytes - work(samples=8).states_bytes
    assert Peak(3, 4).joined(Peak(5, 1)) == Peak(5, 4)


@pytest.mark.parametrize("command", ["calibrate", "compress"])
def test_too_small_a_bound_is_refused_before_any_work(command: str, here: Path) -> None:
    for more in ((), ("--dry-run",)):
        message, hint = fail(command, *QUICK, "--max-memory", "100MB", *more)
        assert "above --max-memory cpu=100MB" in message
        assert "--samples" in hint
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    ("setting", "more", "told"),
    [
        ("--dataset self", "--no-evaluate", "--dataset self loads the whole model and takes "),
        ("--allocator lems", "--no-evaluate", "--allocator lems loads the whole model and takes "),
        ("--allocator learned", "--no-evaluate", "--allocator learned loads the whole model and "),
        ("--evaluate", "--verbose", "Evaluating demo one block at a time takes "),
        ("--recover distill", "--no-evaluate", "--recover distill loads the whole model and "),
        ("--recover lora", "--no-evaluate", "--recover lora loads the whole model and takes "),
    ],
)
def test_activations_logits_and_optimizer_count_beside_the_weights(
    setting: str, more: str, told: str, here: Path
) -> None:
    """Issue 16, 3: the weights alone, in float32 with their file, would fit into this bound."""
    assert IMPORTS_BYTES + 2_755_008 * (4 + 2) < 445e6
    message, hint = fail("compress", *QUICK, *setting.split(), more, "--max-memory", "445MB")
    assert message.startswith(told)
    assert message.endswith("above --max-memory cpu=445MB.")
    assert hint.startswith("Raise --max-memory")
    assert not any(here.iterdir())


def test_rounding_with_compensation_counts_moments(here: Path) -> None:
    """Issue 16, 3."""
    quantize = ("--quantize", "int4", "--quantize-method", "gptq", "--no-evaluate")
    message, hint = fail("compress", *QUICK, *quantize, "--max-memory", "435MB")
    assert message.startswith("--quantize-method gptq takes 4")
    assert "nearest" in hint
    assert not any(here.iterdir())


BOUND = ("--max-memory", "64GB", "--quiet")
WATCHED = """
import re, sys
from pathlib import Path
from hisvd_cli.cli import app
from hisvd_cli.pipelines.memory import placement
from hisvd_cli.pipelines.memory import bounds as memory
from hisvd_cli.pipelines.memory import whole_models

estimates = []
def watched(peak, bounds, device, real=placement.excess):
    estimates.append(peak.host)
    return real(peak, bounds, device)

for module in (memory, placement, whole_models):
    module.excess = watched
try:
    app.main()
except SystemExit as end:
    assert not end.code, end.code
status = Path("/proc/self/status").read_text()
taken = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
sys.stderr.write(f"{max(estimates)} {taken}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
@pytest.mark.parametrize(
    "words",
    [
        ("plan", *QUICK, "--allocator", "lems", "--probe-samples", 4),
        ("plan", *QUICK, "--allocator", "learned", "--learning-steps", 2, "--probe-samples", 4),
        ("eval", "made", "--baseline", "demo", "--windows", 40, "--batch", 8, "--fresh"),
        ("eval", "made", "--windows", 40, "--batch", 8, "--fresh", "--stream", "on"),
        ("calibrate", *QUICK, "--dataset", "self"),
        ("compress", "--from", "made", "--recover", "distill", "--recover-tokens", 8192),
        ("compress", "--from", "made", "--recover", "lora", "--recover-tokens", 8192),
    ],
    ids=["probes", "learned", "eval", "streamed eval", "self", "distill", "lora"],
)
def test_estimates_of_whole_models_are_above_what_runs_take(
    words: tuple[object, ...], here: Path
) -> None:
    # Short texts: the bound does not count tokenizing.
    text, other = (str(text_file(here, words=9000, seed=seed)) for seed in (0, 1))
    given = ("--dataset", text, "--no-evaluate", "--output", "made")
    succeed("compress", *QUICK, *given, "--ratio", 0.6)
    more = {
        "plan": ["--dataset", text],
        "calibrate": [],
        "eval": ["--dataset", other],
        "compress": ["--output", "d", "--recover-seqlen", "256", "--recover-dataset", text],
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, words), *more[str(words[0])], *BOUND],
        cwd=here,
        env=environment({"PYTHONPATH": str(Path(__file__).parents[1])}),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    estimate, taken = map(int, done.stderr.splitlines()[-1].split())
    assert taken <= estimate


def test_a_dry_run_shows_what_the_bound_decides() -> None:
    words = ("calibrate", "--model", "demo", "--samples", 256, "--seqlen", 256, "--dry-run")
    free = as_json(*words)
    bound = free["peak_memory_bytes"] - 1
    kept = as_json(*words, "--max-memory", f"{bound / 1e6:.6f}MB")
    assert (free["hidden_states"], kept["hidden_states"]) == ("host", "file")
    assert kept["peak_memory_bytes"] <= bound
    assert free["batch"] == kept["batch"] == 4
    assert "in a file" in succeed(*words, "--max-memory", f"{bound / 1e6:.6f}MB").stdout


# Hidden states in a file


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_states_are_saved_and_loaded(place: Place, tmp_path: Path) -> None:
    values = torch.randn(300, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    home = StatesHome(CPU, place, tmp_path)
    states = home.take(values.shape, values.dtype)
    states.copy_(values)
    home.settle()
    files = RowFiles(tmp_path, "a")
    files.keep(7, states, home)
    write_tensors(tmp_path / "b.safetensors", {"hidden": values}, {})
    written = tmp_path / "a.000007-000307.safetensors"
    assert torch.equal(load_file(written)["hidden"], values)
    assert written.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = files.load(17, 307, StatesHome(CPU, place, tmp_path))
    assert torch.equal(found, values[10:])
    assert {path.name for path in tmp_path.iterdir()} == {written.name, "b.safetensors"}


def test_a_file_of_something_else_holds_no_states(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(2)}, tmp_path / "x.000000-000002.safetensors")
    with pytest.raises(SourceError, match="Cannot read") as caught:
        RowFiles(tmp_path, "x").load(0, 2, StatesHome(CPU))
    assert caught.value.hint == AGAIN


def test_a_full_disk_is_an_error_before_the_walk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Cannot store 4503599\.6 GB of hidden states"):
        StatesHome(CPU, "file", tmp_path).take((2**40, 1024), torch.float32)


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
def test_what_was_written_to_a_file_is_not_resident(tmp_path: Path) -> None:
    home = StatesHome(CPU, "file", tmp_path)
    states = home.take((64, 1024, 256), torch.float32)  # 67 MB
    before = resident()
    for part in states.split(8):
        part.fill_(1)
        home.settle()
    home.save(tmp_path / "x.safetensors", states)
    assert resident() - before < 20e6
    assert float(states[:, 0, 0].sum()) == 64


def measured(model: Path, folder: Path, place: Place) -> Calibration:
    source = open_source(str(model))
    sample = Sample(random_tokens(5, 24), "random", "file", "0" * 64, seed=0)
    how: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "batch": 2, "settings": {}}
    how |= {"reporter": Silent(), "place": place, "state_seconds": 0}
    made = calibrate(source, sample, folder, keep_inputs=True, **how)
    return measure_gradients(source, sample, made, weights=True, **how)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_all_places_give_the_same_bytes(arch: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    made = [digests(measured(tiny_model(arch), tmp_path / p, p).folder) for p in ("device", "file")]
    assert made[0] == made[1]


def test_a_run_that_was_stopped_goes_on_in_another_place(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(tiny_model("llama"), tmp_path / "whole", "device")
    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "free", _stop_at(1))
        with pytest.raises(StopError):
            measured(tiny_model("llama"), tmp_path / "stopped", "file")
    left = {path.name for path in partial_path(tmp_path / "stopped").iterdir()}
    assert "hidden-00001.000000-000005.safetensors" in left
    made = measured(tiny_model("llama"), tmp_path / "stopped", "host")
    assert digests(made.folder) == digests(whole.folder)


def _stop_at(block: int) -> Any:
    real = BlockWalk.free

    def free(self: BlockWalk, index: int) -> None:
        real(self, index)
        if index == block:
            raise StopError

    return free


# A hard limit

SAMPLES, SEQLEN, WIDTH = 1024, 256, 64
STATES = SAMPLES * SEQLEN * WIDTH * 4
LIMITED = f"""
import resource, sys
from hisvd_cli.cli import app
from hisvd_cli.pipelines import calibration
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.modeling.structure.skeleton import build_meta_model
from hisvd_cli.modeling.sources.opening import open_source
from tests.test_memory import random_sample

# Tokenizing as much text would take memory of its own.
calibration.draw_sample = lambda *_: random_sample()
build_meta_model(open_source(sys.argv[3]))  # behind 'compress --model'
with open("/proc/self/status") as file:
    taken = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
limit = taken + {STATES * 6 // 10}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
app.main()
"""


def words(model: Path, *more: object) -> list[str]:
    """Return the words of a compression into the current folder."""
    given = ["compress", "--model", model, "--dataset", model / "text.txt", "--ratio", 0.6]
    given += ["--samples", SAMPLES, "--seqlen", SEQLEN, "--calibration", "calibration"]
    return [*map(str, [*given, "--output", "out", *more])]


def limited(cwd: Path, *given: str) -> tuple[int, str]:
    """Run the command line in a process that may take, beyond what is imported, six tenths of
    what its hidden states take; return its exit code and what it says."""
    cwd.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *given],
        cwd=cwd,
        env=environment({"PYTHONPATH": str(Path(__file__).parents[1])}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
def test_under_a_hard_limit_a_bounded_run_ends_with_the_same_bytes_and_no_other_run_does(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
    }
    heads: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    dense = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=SEQLEN)
    )
    randomize(dense)
    dense.save_pretrained(model)
    save_tokenizer(model)
    (model / "text.txt").write_text(random_text(10))

    code, told = limited(tmp_path / "unbounded", *words(model))
    assert code == 1
    message, hint = two_lines(told)
    assert message.startswith("Out of memory")
    assert all(lever in hint for lever in ("--samples", "--seqlen", "--batch", "--max-memory"))

    code, told = limited(tmp_path / "bounded", *words(model, "--max-memory", "450MB", "--verbose"))
    assert code == 0, told
    assert "hidden states (67 MB) are kept in a file" in told
    monkeypatch.setattr("hisvd_cli.pipelines.calibration.draw_sample", lambda *_: random_sample())
    succeed(*words(model))  # without any limit
    assert len(digests(here)) > 8
    assert digests(here) == digests(tmp_path / "bounded")


def random_sample() -> Sample:
    return Sample(random_tokens(SAMPLES, SEQLEN), "random", "file", "0" * 64, seed=0)
