"""Perplexity, bits per byte and divergence against code that shares nothing with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hisvd_cli.calibration.text.datasets import Text, load_text
from hisvd_cli.calibration.text.tokens import token_ends
from hisvd_cli.evaluation import measurement
from hisvd_cli.evaluation.intervals import BLOCK, block_sums
from hisvd_cli.evaluation.measurement import Measurement, measure
from hisvd_cli.evaluation.perplexity import (
    PerplexityResult,
    Sums,
    Windows,
    compare,
    evaluation_windows,
    result_of,
)
from hisvd_cli.evaluation.store import Store
from hisvd_cli.modeling.divergence import token_divergences
from hisvd_cli.modeling.passes import FinalStates, Output, Pass, Placement, open_head, open_pass
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import DEMO_FOLDER
from hisvd_cli.utils.errors import DataError
from tests.conftest import MakeModel
from tests.models import random_text, random_tokens

CPU = Placement(torch.device("cpu"), torch.float32, 1)


def by_hand(text: str, seqlen: int, windows: int) -> float:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    losses = []
    for i in range(windows):
        window = ids[i * seqlen : (i + 1) * seqlen].unsqueeze(0)
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


def measured(
    windows: Windows, model: Pass, store: Path, name: str = "demo"
) -> tuple[Sums, PerplexityResult]:
    wanted = Measurement(open_source(name), windows, CPU, Store(store))
    sums = measure(wanted, model, lambda: None)
    return sums, result_of(windows, sums)


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_independent_loop(batch: int, tmp_path: Path) -> None:
    text, source = load_text("demo", "evaluation"), open_source("demo")
    windows = evaluation_windows(text, source, 200, 4)
    with open_pass(source, Placement(CPU.device, CPU.dtype, batch)) as model:
        _, result = measured(windows, model, tmp_path)
    assert result.perplexity == pytest.approx(by_hand(text.content, 200, 4), rel=1e-4)
    assert (result.windows, result.seqlen, result.tokens) == (4, 200, 4 * 199)
    assert result.dataset_hash == text.digest
    spelt = source.tokenizer.batch_decode(windows.ids[:, 1:])
    assert result.bytes == sum(len(part.encode()) for part in spelt)
    nats = math.log(result.perplexity or 0) * result.tokens
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (result.bytes or 1), rel=1e-9)
    assert result.intervals is not None
    low, high = result.intervals["perplexity"] or (0, 0)
    assert 1 < low < (result.perplexity or 0) < high


def test_ends_of_tokens_add_up_to_the_bytes_of_the_text(tiny_model: MakeModel) -> None:
    """Characters of one to four bytes; the tokenizer knows bytes, so some tokens share one."""
    source = open_source(str(tiny_model("llama")))
    content = "in the beginning é 日本 was 🦙\n\n text  \u00a0 of"
    ids, ends = token_ends(Text("t", "file", content), source)
    assert ends is not None
    assert ids.tolist() == source.tokenizer(content)["input_ids"]
    assert int(ends[-1]) == len(content.encode())
    for i in range(len(ids)):
        prefix = str(source.tokenizer.decode(ids[: i + 1]))
        if content.startswith(prefix):  # no character is cut
            assert int(ends[i]) == len(prefix.encode()), prefix


class Scripted:
    """Logits that are made up: window i gets those of ``make(i)``."""

    def __init__(self, vocabulary: int, spoiled: int = -1, dies_at: int = -1) -> None:
        self.vocabulary, self.spoiled, self.dies_at = vocabulary, spoiled, dies_at
        self.seen: list[list[int]] = []

    def run(self, ids: torch.Tensor) -> Iterator[Output]:
        for i, window in enumerate(ids):
            if i == self.dies_at:
                raise KeyboardInterrupt
            self.seen.append(window.tolist())
            generator = torch.Generator().manual_seed(int(window.sum()))
            logits = torch.randn(1, len(window), self.vocabulary, generator=generator)
            if i == self.spoiled:
                logits[0, 3] = math.nan
            yield Output(logits, None)


def demo_windows(count: int, seqlen: int = 16) -> Windows:
    return evaluation_windows(load_text("demo", "evaluation"), open_source("demo"), seqlen, count)


def test_a_window_that_is_not_finite_spoils_the_result_and_is_named(tmp_path: Path) -> None:
    windows = demo_windows(3)
    sums, result = measured(windows, Scripted(4096, spoiled=1), tmp_path)
    assert result.perplexity is None
    assert result.bits_per_byte is None
    assert result.nonfinite_windows == [1]
    assert result.intervals is not None
    assert result.intervals["perplexity"] is None
    assert compare(windows, ("a", sums), ("b", sums)) == []
    again = Store(tmp_path).load(
        Measurement(open_source("demo"), windows, CPU, Store(tmp_path)).key
    )
    assert again is not None
    assert result_of(windows, again) == result


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than one window of 512"):
        evaluation_windows(Text("short", "file", "In the beginning"), open_source("demo"), 512, 0)


def test_a_killed_run_goes_on_after_the_last_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "SAVE_SECONDS", 0.0)
    windows = demo_windows(5)
    whole, _ = measured(windows, Scripted(4096), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measured(windows, Scripted(4096, dies_at=3), tmp_path / "killed")
    rest = Scripted(4096)
    sums, _ = measured(windows, rest, tmp_path / "killed")
    assert rest.seen == windows.ids[3:].tolist()
    assert torch.equal(sums.nats, whole.nats)


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("key", {}, Sums(torch.ones(2, 3, dtype=torch.float64)))
    assert store.load("key") is not None
    store.path("key").write_text("{")
    assert store.load("key") is None


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma2", "phi", "qwen3"])
def test_streamed_and_replayed_logits_are_the_models_own(
    arch: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    source, ids = open_source(str(tiny_model(arch))), random_tokens(3, 24)
    states = FinalStates(tmp_path)
    with open_pass(source, Placement(CPU.device, CPU.dtype, 2)) as model:
        outputs = list(model.run(ids))
    whole = torch.cat([output.logits for output in outputs])
    for i, output in enumerate(outputs):
        states.keep(2 * i, output.final)
    assert states.count() == 3
    for streamed in (False, True):
        how = Placement(CPU.device, CPU.dtype, 2, streamed)
        with open_pass(source, how) as model:
            assert torch.equal(torch.cat([each.logits for each in model.run(ids)]), whole)
        with open_head(source, how) as head:
            parts = [
                head.logits(ids[:2], states.read(0, 2)),
                head.logits(ids[2:], states.read(2, 1)),
            ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_model_whose_blocks_are_not_found_can_be_a_baseline(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    source, ids = open_source(str(tmp_path)), random_tokens(2, 24)
    with open_pass(source, Placement(CPU.device, CPU.dtype, 2)) as model:
        (output,) = model.run(ids)
    assert output.final is not None
    with open_head(source, CPU) as head:
        assert torch.equal(head.logits(ids, output.final), output.logits)


def test_divergence_and_its_interval_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(10, 2 * BLOCK + 41, 50, generator=generator)
    other = reference + 0.3 * torch.randn(reference.shape, generator=generator)
    pairs = [token_divergences(a, b) for a, b in zip(reference, other, strict=True)]
    kl, agreed = (torch.stack(list(part)) for part in zip(*pairs, strict=True))

    p, q = (log_softmax(x[:, :-1].double().numpy()) for x in (reference, other))
    expected = (np.exp(p) * (p - q)).sum(-1)
    assert kl.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert np.array_equal(agreed.numpy(), p.argmax(-1) == q.argmax(-1))

    ids = torch.zeros(10, reference.shape[1], dtype=torch.long)
    windows = Windows(Text("t", "file", "x"), ids, None, "none")
    blocks = [block_sums(x) for x in (kl, kl, agreed)]
    result = result_of(windows, Sums(*blocks))
    assert result.kl == pytest.approx(expected.mean(), rel=1e-5)
    assert result.agreement == pytest.approx(float(agreed.float().mean()), rel=1e-6)
    assert result.intervals is not None
    rng = np.random.default_rng(3)
    drawn = rng.integers(30, size=(20_000, 30))
    cut = [(i, k, min(k + BLOCK, expected.shape[1])) for i in range(10) for k in (0, 128, 256)]
    sums = np.array([expected[i, a:b].sum() for i, a, b in cut])
    counts = np.array([b - a for _, a, b in cut])
    bounds = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    width = bounds[1] - bounds[0]
    assert result.intervals["kl"] == pytest.approx(tuple(bounds), abs=0.06 * width)


def log_softmax(x: Any) -> Any:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_who_is_better_is_said_only_where_the_pairs_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(4, 3 * BLOCK + 1, dtype=torch.long)
    windows = Windows(Text("t", "file", "x"), ids, None, "none")
    hard = 200 + 100 * torch.rand(4, 3, dtype=torch.float64, generator=generator)  # the texts
    noise = torch.rand(4, 3, dtype=torch.float64, generator=generator)
    base, worse = Sums(hard, noise, noise), Sums(hard + 1 + noise, noise + 1, noise - 1)
    found = {each.figure: each for each in compare(windows, ("a", base), ("b", worse))}
    assert {each.better for each in found.values()} == {"a"}
    assert found["nats_per_token"].difference < 0 < found["agreement"].difference
    # Intervals of the two alone overlap by far: it is the pairing that tells.
    alone = [(result_of(windows, sums).intervals or {})["perplexity"] for sums in (base, worse)]
    assert alone[0] is not None
    assert alone[1] is not None
    assert alone[0][1] > alone[1][0]
    same = compare(windows, ("a", base), ("b", Sums(hard + noise - noise.mean())))
    assert [each.better for each in same] == [None]


def test_what_is_a_measurement_of_its_own(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Other tokens, precision or baseline are another measurement; batch and streaming are not."""
    source = open_source(str(tiny_model("llama")))
    windows = evaluation_windows(Text("t", "file", random_text(200)), source, 16, 0)
    other = evaluation_windows(Text("t", "file", random_text(200, 1)), source, 16, 0)
    store = Store(tmp_path)

    def key(read: Windows, how: Placement = CPU, baseline: str = "") -> str:
        return Measurement(source, read, how, store, baseline).key

    half = Placement(CPU.device, torch.bfloat16, 1)
    assert len({key(windows), key(other), key(windows, half), key(windows, CPU, "x")}) == 4
    assert key(windows) == key(windows, Placement(CPU.device, CPU.dtype, 4, streamed=True))
