"""``hisvd compress --stages``: what stages do, against the same by hand; kills; bad input."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.pipelines.config.resolved import Resolved
from hisvd_cli.utils.progress import Silent
from tests import schemas
from tests.cli_helpers import as_json, digests, fail, running, script, stop_at, succeed, text_file
from tests.conftest import CACHE, MakeModel
from tests.models import load_dense, names

SAMPLES, SEQLEN = 6, 32
TWO = ("--stages", 2, "--ratio", 0.5)
UNIFORM = ("--allocator", "uniform")
Command = tuple[object, ...]


@pytest.fixture
def text(tmp_path: Path) -> Command:
    """Flags that calibrate on a little text."""
    return ("--dataset", text_file(tmp_path), "--samples", SAMPLES, "--seqlen", SEQLEN)


@pytest.fixture
def command(tiny_model: MakeModel, text: Command) -> Command:
    """A compression of a tiny model."""
    return ("compress", "--model", tiny_model("llama"), *text)


def provenance(folder: Path) -> Any:
    return json.loads((folder / "hisvd.json").read_text(encoding="utf-8"))


def by_hand(
    command: Command, text: Command, model: Path, add: Callable[[str, Tensor, Tensor], Tensor]
) -> Path:
    """Truncate, multiply out, add ``add(name, Δ, W)`` to every sublayer, and truncate again: with
    commands of their own, and files written here."""
    succeed(*command, *UNIFORM, "--ratio", 0.5, "--output", "first")
    succeed("convert", "first", "--to", "dense", "--output", "multiplied")
    shutil.copytree(model, "corrected")
    weights, teacher = load_file("multiplied/model.safetensors"), load_file(model / SINGLE)
    for name in provenance_ranks(Path("first")):
        key = f"{name}.weight"
        weights[key] = weights[key] + add(name, teacher[key] - weights[key], weights[key])
    save_file(weights, Path("corrected") / SINGLE, {"format": "pt"})
    again = ("compress", "--model", "corrected", *text)
    succeed(*again, *UNIFORM, "--ratio", 0.5, "--output", "second")
    return Path("second")


SINGLE = "model.safetensors"


def provenance_ranks(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sorted(config["quantization_config"]["ranks"])


def test_two_stages_are_two_commands_with_a_blend_between(
    command: Command, text: Command, tiny_model: MakeModel, here: Path
) -> None:
    blend = ("--correction", "alpha-blend", "--correction-alpha", 0.25)
    document = as_json(*command, *TWO, *UNIFORM, *blend, "--output", "made")
    jsonschema.Draft202012Validator(schemas.COMPRESS).validate(document)
    hand = by_hand(command, text, tiny_model("llama"), lambda _n, delta, _w: 0.25 * delta)
    assert (here / "made" / SINGLE).read_bytes() == (hand / SINGLE).read_bytes()
    assert (here / "made" / SINGLE).read_bytes() != (here / "first" / SINGLE).read_bytes()


@pytest.mark.parametrize("method", ["pull-subspace", "project-to-delta", "gradient-step"])
def test_gradients_are_those_of_the_whole_truncated_model(
    method: str, command: Command, text: Command, tiny_model: MakeModel, here: Path
) -> None:
    step = ("--correction-step", 0.5) if method == "gradient-step" else ()
    options = ("--correction", method, *step)
    succeed(*command, *TWO, *UNIFORM, *options, "--output", "made")
    found: dict[str, Tensor] = {}

    def add(name: str, delta: Tensor, _weight: Tensor) -> Tensor:
        g = found.get(name)
        if g is None:
            found.update(whole_gradients(Path("multiplied"), command))
            g = found[name]
        if method == "gradient-step":
            return -0.5 * g
        if method == "project-to-delta":
            return (g * delta).sum() / (delta * delta).sum() * delta
        return (g * delta).sum() / (g * g).sum() * g

    hand = by_hand(command, text, tiny_model("llama"), add)
    one, other = load_dense(here / "made"), load_dense(hand)
    ids = torch.arange(20)[None]
    # Factors may differ by signs and rotations; what they compute does not.
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=0, atol=1e-3)
    first = load_dense(here / "first")
    assert (one(ids).logits - first(ids).logits).abs().max() > 1e-3


def whole_gradients(folder: Path, command: Command) -> dict[str, Tensor]:
    """Return the gradients of the mean loss on the calibration's tokens, by autograd."""
    from hisvd_cli.calibration.text.datasets import load_text
    from hisvd_cli.calibration.text.tokens import sample_windows, tokenize
    from hisvd_cli.modeling.sources.opening import open_source

    dataset = str(command[command.index("--dataset") + 1])
    read = load_text(dataset, "calibration")
    tokens = sample_windows(tokenize(read, open_source(str(folder))), SAMPLES, SEQLEN, 0, read.name)
    model = load_dense(folder)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {
        name.removesuffix(".weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_one_stage_changes_nothing(command: Command, here: Path) -> None:
    succeed(*command, "--ratio", 0.5, "--output", "plain")
    succeed(*command, "--ratio", 0.5, "--stages", 1, "--output", "one")
    assert digests(here / "plain") == digests(here / "one")
    assert "stages" not in provenance(here / "one")
    assert "stages" not in (here / "one" / "README.md").read_text(encoding="utf-8")


def test_the_checkpoint_names_the_original_and_its_stages(command: Command, here: Path) -> None:
    succeed(*command, "--ratio", 0.5, "--output", "plain")
    words = (*command, "--stages", 3, "--correction", "alpha-blend", "--ratio", 0.5)
    succeed(*words, "--output", "made")
    assert names(here) == ["made", "plain"]
    record, plain = provenance(here / "made"), provenance(here / "plain")
    stages = record.pop("stages")
    for key in ("model", "calibration", "gradients", "versions"):
        assert record[key] == plain[key]
    assert [stage["correction"] for stage in stages] == ["alpha-blend", "alpha-blend", None]
    assert stages[2]["kept_parameters"] == record["kept_parameters"]
    assert len({stage["statistics"] for stage in stages}) == 3
    card = (here / "made" / "README.md").read_text(encoding="utf-8")
    assert "| stages | 3, with alpha-blend correction in between |" in card
    audit = as_json("inspect", "made")
    assert audit["problems"] == []
    dataset = command[command.index("--dataset") + 1]
    message, _hint = fail("eval", "made", "--dataset", dataset, "--seqlen", 32)
    assert "was calibrated on" in message


@pytest.mark.parametrize("arch", ["opt", "phi3"])
def test_what_a_later_stage_leaves_dense_is_the_original(
    arch: str, text: Command, tiny_model: MakeModel, here: Path
) -> None:
    model = tiny_model(arch)
    words = ("compress", "--model", model, *text, "--stages", 2, "--ratio", 0.7)
    succeed(*words, "--correction", "gradient-step", "--correction-step", 50, "--output", "made")
    original = load_file(model / SINGLE)
    made = load_file(here / "made" / SINGLE)
    kept = [name for name in made if name in original and f"{name}_u" not in made]
    assert len(kept) > 5
    assert all(torch.equal(made[name], original[name]) for name in kept)


def test_a_plan_gives_its_ranks_to_all_stages(command: Command, here: Path) -> None:
    planned = ("plan", *command[1:], "--ratio", 0.5, "--output", "plan.json")
    succeed(*planned)
    blend = ("--stages", 2, "--correction", "alpha-blend")
    succeed(*command, "--plan", "plan.json", *blend, "--output", "made")
    succeed(*command, "--plan", "plan.json", "--output", "plain")
    same = [(here / name / "plan.json").read_bytes() for name in ("made", "plain")]
    assert same[0] == same[1]
    assert (here / "made" / SINGLE).read_bytes() != (here / "plain" / SINGLE).read_bytes()


def test_a_single_file_and_a_grid_take_stages(command: Command, here: Path) -> None:
    blend = ("--stages", 2, "--correction", "alpha-blend")
    succeed(*command, *blend, "--ratio", 0.5, "--ratio", 0.7, "--output", "grid")
    succeed(*command, *blend, "--ratio", 0.5, "--output", "alone")
    assert digests(here / "grid" / "llama-0.5") == digests(here / "alone")
    kept = as_json(*command, *blend, "--ratio", 0.5, "--ratio", 0.7, "--output", "grid")
    assert [cell["status"] for cell in kept["cells"]] == ["kept", "kept"]
    succeed(*command, *blend, "--ratio", 0.5, "--output", "one.pt")
    assert names(here) == ["alone", "grid", "one.plan.json", "one.pt"]


def test_a_forecast_counts_the_stages(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The measured rate differs from one call to the next on a busy machine.
    monkeypatch.setattr("hisvd_cli.allocation.estimate.product_rate", lambda *_: 1e9)
    one = as_json(*command, "--dry-run")
    three = as_json(*command, "--stages", 3, "--dry-run")
    for document in (one, three):
        jsonschema.Draft202012Validator(schemas.COMPRESS_FORECAST).validate(document)
    assert three["stages"]["decompose"] > 2 * one["stages"]["decompose"]
    assert three["stages"]["calibrate"] > 2 * one["stages"]["calibrate"]
    assert three["peak_memory_bytes"] >= one["peak_memory_bytes"]
    assert names(here) == []


class _StoppedError(Exception):
    pass


class _Stopping(Silent):
    """Stops the run at its n-th step over all that it tells of."""

    def __init__(self, steps: int) -> None:
        self._left = itertools.count(1)
        self._steps = steps

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Callable[[], None]]:  # noqa: ARG002
        def step() -> None:
            if next(self._left) >= self._steps:
                raise _StoppedError

        yield step


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tiny_model: MakeModel, text: Command, here: Path) -> None:
    """Stopped at steps all over three stages: the rerun gives the same bytes."""
    flags: dict[tuple[str, str], Any] = {
        ("model", "name"): str(tiny_model("llama")),
        ("calibration", "dataset"): str(text[1]),
        ("calibration", "samples"): SAMPLES,
        ("calibration", "seqlen"): SEQLEN,
        ("plan", "ratio"): [0.5],
        ("compress", "stages"): 3,
    }
    resolved = resolve(flags, environ={}, start=here)
    compress_model(resolved, Path("whole"), None, False, Silent())
    whole = digests(here / "whole")
    finished, steps = False, 25
    while not finished:
        finished = not _stopped(resolved, steps)
        if steps % 2 and not finished:  # else the next stop is in the same run
            compress_model(resolved, Path("stopped"), None, False, Silent())
            assert digests(here / "stopped") == whole
            shutil.rmtree(here / "stopped")
            assert names(here) == ["whole"]
        steps += 17
    assert steps > 100
    assert digests(here / "stopped") == whole


def _stopped(resolved: Resolved, steps: int) -> bool:
    """Run until ``steps`` steps were told; return whether that was before the end."""
    try:
        compress_model(resolved, Path("stopped"), None, False, _Stopping(steps))
    except _StoppedError:
        assert not Path("stopped").exists()
        return True
    return False


@pytest.mark.slow
def test_killed_in_the_second_stage(here: Path) -> None:
    demo = ("compress", "--model", "demo", "--samples", 8, "--seqlen", 128, "--no-evaluate")
    words = (*demo, *TWO, *UNIFORM, "--correction", "alpha-blend")
    cache = {"HISVD_CACHE": str(here.parent / CACHE)}
    assert script(*words, "--output", "whole", cwd=here, env=cache).returncode == 0
    making = here / ".made.partial"
    with running(*words, "--output", "made", cwd=here) as process:
        stop_at(process, "*.part", making, 10, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert names(here / ".made.hisvd.work" / ".stages.partial" / "stage-1") == [
        ".plan.json.seal",
        "corrected",
        "plan.json",
    ]
    assert script(*words, "--output", "made", cwd=here, env=cache).returncode == 0
    assert digests(here / "made") == digests(here / "whole")
    assert names(here) == ["made", "whole"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--stages", 0), "--stages 0 must be"),
        (("--stages", 2, "--correction", "alpha-blnd"), "Did you mean 'alpha-blend'?"),
        (("--stages", 2, "--correction-alpha", 1.5), "--correction-alpha 1.5 must be"),
        (("--stages", 2, "--correction-step", 0), "--correction-step 0 must be"),
        (("--stages", 2, "--correction-batches", 0), "--correction-batches 0 must be"),
        (("--correction", "alpha-blend"), "--correction has no effect without --stages 2"),
        (("--stages", 1, "--correction-alpha", 0.5), "--correction-alpha has no effect without"),
    ],
)
def test_bad_input(words: Command, told: str, command: Command, here: Path) -> None:
    message, _hint = fail(*command, *words, code=2)
    assert told in message
    assert names(here) == []


def test_a_step_that_leads_nowhere(command: Command, here: Path) -> None:
    words = ("--stages", 2, "--correction", "gradient-step", "--correction-step", "1e39")
    message, hint = fail(*command, *words, "--ratio", 0.5)
    assert "not finite" in message
    assert "--correction" in hint
    assert not any(name.startswith("llama") for name in names(here))
