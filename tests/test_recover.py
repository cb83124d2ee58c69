"""Short training after truncation: its loss, its parts, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hisvd_cli.finetuning.adaptation import Adapter, adapted_model, as_linears
from hisvd_cli.finetuning.distillation import divergence_from, likelihood_of, summed_loss
from hisvd_cli.finetuning.factor_training import RunOptions, distill
from hisvd_cli.finetuning.trained_pairs import balanced, open_pairs, stored_factors
from hisvd_cli.finetuning.trainer import Schedule, Trainee, Training
from hisvd_cli.finetuning.training_data import (
    TrainingData,
    instruction_data,
    load_training_data,
    windows_of,
)
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.decoding import TwoParts
from hisvd_cli.modeling.layers.lowrank import dense_product
from hisvd_cli.modeling.layers.transformers_plugin import low_rank_layers
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.modeling.whole_model import load_model
from hisvd_cli.utils.errors import NumericalError
from hisvd_cli.utils.progress import Silent
from tests.cli_helpers import as_json, digests, fail, running, stop_at, succeed
from tests.models import names, random_tokens, save_model

CPU = torch.device("cpu")
SHORT = ("--recover-seqlen", "32", "--recover-samples", "24", "--recover-batch", "4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model, truncated, by storage."""
    home = tmp_path_factory.mktemp("made")
    flags = ("--model", "demo", "--samples", "8", "--seqlen", "64", "--ratio", "0.4")
    for storage in ("pair", "pivoted"):
        where = ("--calibration", home / "calibration", "--output", home / storage)
        succeed("compress", *flags, "--storage", storage, "--no-evaluate", *where)
    return {storage: home / storage for storage in ("pair", "pivoted")}


def schedule(**changes: Any) -> Schedule:
    plain = {"seconds": None, "tokens": 600, "learning_rate": 0.05, "batch": 3, "together": 2}
    return Schedule(**{**plain, "seed": 0, **changes})


# The loss


def test_chunked_divergence_and_its_gradient_are_the_plain_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    head, other = nn.Linear(8, 50), nn.Linear(6, 50)
    states = torch.randn(11, 8, generator=generator).requires_grad_()
    reference = torch.randn(11, 6, generator=generator)
    tau = 2.0
    chunked = summed_loss(states, head, divergence_from(reference, other, tau), rows=4)
    (gradient,) = torch.autograd.grad(3 * chunked, states)
    plain = tau**2 * functional.kl_div(
        (head(states) / tau).log_softmax(-1),
        (other(reference) / tau).softmax(-1),
        reduction="sum",
    )
    (expected,) = torch.autograd.grad(3 * plain, states)
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(gradient, expected)


def test_chunked_likelihood_and_its_gradient_are_the_plain_ones() -> None:
    head, states = nn.Linear(8, 50), torch.randn(11, 8, requires_grad=True)
    targets = torch.arange(11)
    chunked = summed_loss(states, head, likelihood_of(targets), rows=4)
    plain = functional.cross_entropy(head(states), targets, reduction="sum")
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(
        torch.autograd.grad(chunked, states), torch.autograd.grad(plain, states)
    )


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma2"])
def test_a_model_in_two_parts_is_the_whole(arch: str, tmp_path: Path) -> None:
    """Also where the head does more than a product, as gemma2's soft cap."""
    model = load_model(save_model(arch, tmp_path / arch), CPU, torch.float32)
    parts, ids = TwoParts(model, torch.float32), random_tokens(2, 9)
    states = parts.states(ids)
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(parts.head(states.flatten(0, 1)), whole.flatten(0, 1))


# Pairs


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_balanced_pairs_are_the_same_layers(made: dict[str, Path], storage: str) -> None:
    model = load_model(made[storage], CPU, torch.float32)
    products = {n: layer.dense_weight() for n, layer in low_rank_layers(model).items()}
    ids = random_tokens(1, 16)
    before = model(input_ids=ids).logits
    pairs = open_pairs(model)
    assert pairs.keys() == products.keys()
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-3, atol=1e-3)
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.u.T @ pair.u, pair.v @ pair.v.T, rtol=1e-3, atol=1e-4)
        stored = stored_factors(
            pair.u, pair.v, open_checkpoint(made[storage]).storage, torch.float32
        )
        torch.testing.assert_close(dense_product(stored), products[name], rtol=1e-3, atol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(pairs)


def test_balancing_survives_a_singular_product() -> None:
    u, v = torch.zeros(6, 3), torch.randn(3, 5)
    u[:, 0] = 1
    left, right = balanced(u, v)
    torch.testing.assert_close(left @ right, u @ v)


# The loop


class Quadratic:
    """Something to train: a vector, towards zero."""

    def __init__(self, bad_step: int = -1) -> None:
        self.x = nn.Parameter(torch.full((4,), 2.0))
        self.calls = 0
        self.bad_step = bad_step

    def trainee(self) -> Trainee:
        return Trainee(
            {"x": self.x}, 10, self.loss, lambda: {"loss": float(self.x.detach().norm())}
        )

    def loss(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        self.calls += 1
        factor = torch.nan if self.calls == self.bad_step else 1.0
        return (self.x**2).sum() * len(rows) * factor, 10 * len(rows)


def test_training_keeps_to_its_tokens_and_gets_better(tmp_path: Path) -> None:
    best, progress = Training(Quadratic().trainee(), schedule(), tmp_path, CPU, Silent()).run()
    assert progress.tokens == 600
    assert progress.steps == 20
    assert progress.best["loss"] < progress.before["loss"] == pytest.approx(4.0)
    assert float(best["x"].norm()) == pytest.approx(progress.best["loss"])


def test_the_best_state_is_not_the_last(tmp_path: Path) -> None:
    """Where the held-out text gets worse as the training text gets better."""
    quadratic = Quadratic()
    trainee = replace(
        quadratic.trainee(), held_out=lambda: {"loss": float((quadratic.x.detach() - 2).norm())}
    )
    best, progress = Training(trainee, schedule(), tmp_path, CPU, Silent()).run()
    assert progress.best_step == 0
    torch.testing.assert_close(best["x"], torch.full((4,), 2.0))


def test_a_loss_that_is_not_finite_stops_with_the_best_state(tmp_path: Path) -> None:
    told: list[str] = []

    class Telling(Silent):
        def warn(self, message: str) -> None:
            told.append(message)

    best, progress = Training(
        Quadratic(bad_step=20).trainee(), schedule(), tmp_path, CPU, Telling()
    ).run()
    assert "not finite" in progress.stopped
    assert progress.steps < 20
    assert bool(best["x"].isfinite().all())
    assert progress.best["loss"] < 4
    assert "best state" in told[0]


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    quadratic = Quadratic()
    quadratic.x.data[0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        Training(quadratic.trainee(), schedule(), tmp_path, CPU, Silent()).run()


def test_a_training_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """To the very numbers that it would have had: optimizer, order and schedule go on."""
    often = schedule(state_seconds=0.0)
    whole, at_once = Training(
        Quadratic().trainee(), often, _folder(tmp_path / "whole"), CPU, Silent()
    ).run()

    class KilledError(Exception):
        pass

    class Killed(Quadratic):
        def loss(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
            if self.calls == 17:
                raise KilledError
            return super().loss(rows)

    home = _folder(tmp_path / "killed")
    with pytest.raises(KilledError):
        Training(Killed().trainee(), often, home, CPU, Silent()).run()
    second = Quadratic()
    resumed, progress = Training(second.trainee(), often, home, CPU, Silent()).run()
    assert torch.equal(resumed["x"], whole["x"])
    assert second.calls < 40 - 10
    assert (progress.steps, progress.tokens) == (at_once.steps, at_once.tokens)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_rate_rises_and_falls() -> None:
    plan = schedule(learning_rate=1.0)
    rates = [plan.rate(i / 100) for i in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 5
    assert rates[0] < 0.1
    assert rates[-1] == pytest.approx(0.0)


# Distilling


def test_distilling_lowers_the_held_out_divergence_and_writes_what_it_trained(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """For both storages, the folder that plain transformers loads is what was trained."""
    for storage, folder in made.items():
        output = tmp_path / storage
        flags = ("--from", folder, "--recover", "distill", "--recover-tokens", "3000", *SHORT)
        document = as_json("compress", *flags, "--dtype", "float32", "--output", output)
        gain = document["recovery"]
        assert gain["best"]["kl"] < 0.9 * gain["before"]["kl"]
        before, after = open_checkpoint(folder), open_checkpoint(output)
        assert (after.ranks, after.storage) == (before.ranks, before.storage)
        assert {n: (i.dtype, i.shape) for n, i in after.weights.infos.items()} == {
            n: (i.dtype, i.shape) for n, i in before.weights.infos.items()
        }
        assert names(output) == names(folder)
        recovery = after.provenance["recovery"]
        assert recovery["method"] == "distill"
        assert recovery["data"]["dataset"] == "demo"
        assert "distill" in (output / "README.md").read_text(encoding="utf-8")
        assert as_json("inspect", output)["problems"] == []
        assert "fine-tuning" in succeed("inspect", output).output
    assert names(tmp_path) == ["hisvd-cache", *made]


def test_the_written_model_is_the_trained_one(made: dict[str, Path], tmp_path: Path) -> None:
    teacher, lessons = open_source("demo"), _lessons()
    for storage, folder in made.items():
        factors, _ = distill(
            Source(storage, folder),
            teacher,
            lessons,
            schedule(learning_rate=1e-3),
            RunOptions(CPU, torch.float32),
            1.0,
            _folder(tmp_path / storage),
            Silent(),
        )
        model = load_model(folder, CPU, torch.float32)
        for name, pair in open_pairs(model).items():
            pair.u.data, pair.v.data = factors[name]
        written = load_model(folder, CPU, torch.float32)
        kind = open_checkpoint(folder).storage
        for name, layer in low_rank_layers(written).items():
            layer.load_state_dict(stored_factors(*factors[name], kind, torch.float32), strict=False)
        ids = lessons.ids[:1]
        torch.testing.assert_close(
            written(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3
        )


def _lessons() -> TrainingData:
    return windows_of(random_tokens(1, 32 * 16)[0], 32, "random", "")


def test_checkpointed_activations_give_the_same_training(
    made: dict[str, Path], tmp_path: Path
) -> None:
    factors = [
        distill(
            Source("pair", made["pair"]),
            open_source("demo"),
            _lessons(),
            schedule(learning_rate=1e-3, tokens=200),
            RunOptions(CPU, torch.float32, checkpointing),
            1.0,
            _folder(tmp_path / str(checkpointing)),
            Silent(),
        )[0]
        for checkpointing in (False, True)
    ]
    for name, (u, v) in factors[0].items():
        torch.testing.assert_close(factors[1][name][0], u)
        torch.testing.assert_close(factors[1][name][1], v)


@pytest.mark.slow
def test_compressing_and_recovering_at_once_is_the_same(made: dict[str, Path], here: Path) -> None:
    flags = ("--recover", "distill", "--recover-tokens", "500", *SHORT)
    two = as_json("compress", "--from", made["pair"], *flags, "--output", here / "two")
    calibration = made["pair"].parent / "calibration"
    one = ("--model", "demo", "--calibration", calibration, "--ratio", "0.4", "--no-evaluate")
    document = as_json("compress", *one, *flags, "--output", here / "one")
    assert document["seconds"]["recover"] > 0
    assert two["bytes"] == document["bytes"]
    weights = [(here / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert names(here) == ["one", "two"]


@pytest.mark.slow
def test_a_killed_recovery_goes_on(made: dict[str, Path], here: Path) -> None:
    flags = ("--recover", "distill", "--recover-tokens", "1500", *SHORT)
    command = ("compress", "--from", made["pair"], *flags, "--output", "out", "-q")
    with running(*command, cwd=here) as process:
        stop_at(process, ".out.partial/training/best.safetensors", here, 1, signal.SIGKILL)
    assert not (here / "out").exists()
    with running(*command, cwd=here) as process:
        assert process.wait(240) == 0
    assert names(here) == ["out"]
    succeed(*command[:-2], "whole", "-q")
    assert digests(here / "out") == digests(here / "whole")


# Adapting


def test_merged_adapters_compute_what_they_did_beside_the_layers(made: dict[str, Path]) -> None:
    model = load_model(made["pair"], CPU, torch.float32)
    layers = as_linears(model)
    for factor in ("u", "v"):
        adapted = adapted_model(model, [f"{name}.{factor}" for name in layers], Adapter(4, 8, 0.5))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * len(layers)
        for parameter in trained:
            nn.init.normal_(parameter, std=0.05)
        ids = random_tokens(1, 16)
        beside = model(input_ids=ids).logits
        adapted.merge_and_unload()
        torch.testing.assert_close(model(input_ids=ids).logits, beside, rtol=1e-3, atol=1e-3)
    assert all(type(layer.get_submodule(f)) is nn.Linear for layer in layers.values() for f in "uv")


def test_lora_on_instructions(made: dict[str, Path], here: Path) -> None:
    rows = [
        {"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))}
        for i in range(4, 28)
    ]
    (here / "set.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ("--recover", "lora", "--recover-dataset", "set.json", "--recover-seqlen", "160")
    more = ("--recover-batch", "4", "--lora-epochs", "1", "--recover-learning-rate", "0.01")
    document = as_json("compress", "--from", made["pivoted"], *flags, *more, "--output", "out")
    gain = document["recovery"]
    assert gain["best"]["loss"] < gain["before"]["loss"]
    recovery = open_checkpoint(here / "out").provenance["recovery"]
    assert recovery["data"]["kind"] == "instructions"
    assert as_json("inspect", "out")["problems"] == []


def test_only_answers_count() -> None:
    source = open_source("demo")
    row = {"instruction": "Say it.", "input": "A word.", "output": "yes yes"}
    lessons = instruction_data([row], source, 256, "set")
    ids, counted = lessons.ids[0], lessons.counted[0]
    predicted = ids.roll(-1)[counted].tolist()
    answer = source.tokenizer("yes yes", add_special_tokens=False)["input_ids"]
    assert predicted[: len(answer)] == answer
    assert len(predicted) <= len(answer) + 1  # and the end
    asked = str(source.tokenizer.decode(ids[: counted.nonzero()[0, 0] + 1]))
    assert asked.rstrip().endswith("### Response:")
    assert "A word." in asked


# What is refused, before any work


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "Do.", "answer": "x"}, "output"),
        ({"question": "Do?", "answer": "x"}, "question"),
    ],
)
def test_rows_without_the_expected_fields(
    made: dict[str, Path], here: Path, row: dict[str, str], told: str
) -> None:
    (here / "set.jsonl").write_text(json.dumps(row), encoding="utf-8")
    flags = ("--recover", "lora", "--recover-dataset", "set.jsonl")
    message, _ = fail("compress", "--from", made["pair"], *flags)
    assert told in message
    assert names(here) == ["set.jsonl"]


def test_a_teacher_with_another_tokenizer(made: dict[str, Path], here: Path) -> None:
    other = save_model("llama", here / "other")
    message, hint = fail(
        "compress", "--from", made["pair"], "--recover", "distill", "--model", other
    )
    assert "tokenizer" in message
    assert "--model" in hint


def test_a_dense_folder(here: Path) -> None:
    save_model("llama", here / "dense")
    message, _ = fail("compress", "--from", "dense", "--recover", "distill")
    assert "not a compressed model" in message


@pytest.mark.parametrize("flag", ["--recover-tokens", "--recover-minutes"])
def test_a_budget_of_nothing(made: dict[str, Path], flag: str) -> None:
    message, _ = fail("compress", "--from", made["pair"], "--recover", "distill", flag, "0", code=2)
    assert flag in message


def test_nothing_to_do(made: dict[str, Path]) -> None:
    message, _ = fail("compress", "--from", made["pair"], code=2)
    assert "Nothing" in message


@pytest.mark.parametrize("flag", [("--ratio", 0.5), ("--stages", 2), ("--quantize", "int8")])
def test_flags_of_a_compression_beside_a_checkpoint(
    made: dict[str, Path], flag: tuple[str, object]
) -> None:
    flags = ("--recover", "distill", *flag)
    message, hint = fail("compress", "--from", made["pair"], *flags, code=2)
    assert flag[0] in message
    assert ("hisvd convert" in hint) == (flag[0] == "--quantize")


def test_the_checkpoint_itself_as_output(made: dict[str, Path]) -> None:
    flags = ("--recover", "distill", "--output", made["pair"], "--overwrite")
    message, _ = fail("compress", "--from", made["pair"], *flags)
    assert "is the input" in message


def test_a_file_as_output(made: dict[str, Path], here: Path) -> None:
    flags = ("--recover", "distill", "--output", here / "made.pt")
    message, hint = fail("compress", "--from", made["pair"], *flags, code=2)
    assert "made.pt" in message
    assert "convert" in hint


def test_a_dry_run_does_nothing(made: dict[str, Path], here: Path) -> None:
    flags = ("--recover", "distill", "--recover-minutes", "3", "--output", "out", "--dry-run")
    forecast = as_json("compress", "--from", made["pair"], *flags)
    assert (forecast["seconds"], forecast["tokens"]) == (180, None)
    assert names(here) == []


def test_what_is_dropped_from_a_text(here: Path) -> None:
    (here / "text.txt").write_text("the <unk> of words <unk> the text " * 30, encoding="utf-8")
    (here / "same.txt").write_text("the of words the text " * 30, encoding="utf-8")
    source = open_source("demo")
    dropped = load_training_data("text.txt", source, 16, "<unk>")
    assert torch.equal(dropped.ids, load_training_data("same.txt", source, 16).ids)


def test_a_text_too_short(made: dict[str, Path], here: Path) -> None:
    (here / "short.txt").write_text("one two", encoding="utf-8")
    flags = ("--recover", "distill", "--recover-dataset", "short.txt")
    message, hint = fail("compress", "--from", made["pair"], *flags)
    assert "fewer than one window" in message
    assert "--recover-seqlen" in hint


def test_quantized_factors(made: dict[str, Path], here: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = here / "int8"
    shutil.copytree(made["pair"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = f"{next(iter(open_checkpoint(folder).ranks))}.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message, _ = fail("compress", "--from", folder, "--recover", "distill")
    assert "cannot be trained" in message
