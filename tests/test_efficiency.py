"""``hisvd eval --efficiency``: what is counted, in which order, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hisvd_cli.evaluation.efficiency import (
    AliveBytes,
    Runner,
    TimedWork,
    Timing,
    Turn,
    percentiles,
    take_turn,
    time_in_turns,
    versus,
)
from tests import schemas
from tests.cli_helpers import as_json, fail, succeed, text_file
from tests.conftest import MakeModel
from tests.models import VOCABULARY
from tests.test_eval_grid import holds

_SMALL = ("--efficiency", "--prompt-tokens", 12, "--new-tokens", 3, "--turns", 2)


class Ticking:
    """A model that notes its calls and always says token 0, which ends a text."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self._name = name
        self._log = log

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(10)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self._log.append((self._name, input_ids.shape[1]))
        logits = torch.zeros(len(input_ids), 1, VOCABULARY)
        logits[..., 0] = 1
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_a_turn_counts_what_was_made_on_a_fake_clock() -> None:
    ticks = iter([0.0, 5.0, 6.0, 8.0, 11.0])
    turn = take_turn(Ticking("a", []), torch.zeros(2, 7, dtype=torch.long), 3, ticks.__next__)
    assert turn == Turn(5.0, (1.0, 2.0, 3.0), prompt_tokens=14, new_tokens=6)
    assert turn.seconds("decode") == 6


def test_models_take_turns_and_the_first_does_not_count() -> None:
    log: list[tuple[str, int]] = []
    runners = {name: Runner(Ticking(name, log)) for name in "ab"}  # type: ignore[arg-type]
    steps: list[None] = []
    # Seconds grow from call to call, so the turn that does not count would be seen.
    clock = (float(i * i) for i in count())
    work = TimedWork(2, 4, 3, turns=2)
    timings = time_in_turns(runners, work, lambda: steps.append(None), clock.__next__)
    turn = [4, 1, 1, 1]  # a prompt, then a token at a time, though each ends a text
    passes = [(name, length) for name in "ab" * 4 for length in turn]  # memory, warm-up, two turns
    assert log == passes
    assert len(steps) == 6
    assert [len(timing.turns) for timing in timings.values()] == [2, 2]
    assert timings["a"].turns[0].prefill == 11**2 - 10**2  # after five ticks of each warm-up
    assert timings["a"].document()["decode"]["tokens"] == 2 * 2 * 3


def test_percentiles_are_those_of_numpy() -> None:
    seconds = np.random.default_rng(0).exponential(size=37)
    found = percentiles(list(seconds))
    for p in (50, 90, 99):
        assert found[f"p{p}"] == pytest.approx(np.percentile(seconds, p))


@pytest.mark.parametrize(
    ("seconds", "speedup", "verdict"),
    [([1.0, 1.5, 1.0], 2.0, "faster"), ([3.0, 4.0, 5.0], 0.5, "slower"), ([1, 3, 2], 1, "unclear")],
)
def test_faster_is_said_where_every_turn_says_so(
    seconds: list[float], speedup: float, verdict: str
) -> None:
    def timing(all_seconds: list[float]) -> Timing:
        return Timing(tuple(Turn(1.0, (s,), 1, 1) for s in all_seconds), 0)

    found = versus(timing(seconds), timing([2.0, 2.0, 2.0]), "decode")
    assert (found.speedup, found.verdict) == (speedup, verdict)


def test_alive_bytes_are_those_of_new_tensors() -> None:
    given = torch.zeros(100, 10)
    with torch.inference_mode(), AliveBytes() as alive:
        first = given + 1  # 4000 bytes
        second = first @ first.T  # a view, and 40000 bytes
        del first
        second = second + 1  # 40000 more while both are there
        second.relu_()
    assert alive.peak == 80000


def test_a_model_beside_its_baseline(tiny_model: MakeModel, tmp_path: Any) -> None:
    text = ("--dataset", text_file(tmp_path, 300), "--windows", 2, "--seqlen", 16)
    dense, other = tiny_model("llama"), tiny_model("opt")
    command = ("eval", other, *text, *_SMALL, "--batch-sizes", "2,1")
    document = holds(as_json(*command, "--baseline", dense), schemas.EVAL)
    found = document["efficiency"]
    assert [each["batch"] for each in found["batches"]] == [1, 2]
    for each in found["batches"]:
        for side in ("model", "baseline"):
            assert each[side]["prefill"]["tokens"] == 2 * 12 * each["batch"]
            assert each[side]["decode"]["tokens"] == 2 * 3 * each["batch"]
            assert each[side]["peak_memory_bytes"] > found["weight_bytes"] / 2
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense)
    assert found["baseline_weight_bytes"] == 4 * model.num_parameters()

    shown = succeed(*command, "--baseline", dense, env={"COLUMNS": "80", "NO_COLOR": "1"}).stdout
    slow = re.search(r"Not faster than the baseline: ([^.]+)\.", " ".join(shown.split()))
    verdicts = re.findall(r"\b(faster|slower|unclear)\b", shown.split("Not faster", 1)[0])
    assert len(verdicts) == 4, "two phases at two batch sizes"
    assert (slow is None) == (set(verdicts) == {"faster"})
    assert slow is None or len(slow[1].split(", ")) == 4 - verdicts.count("faster")
    assert max(map(len, shown.splitlines())) <= 80
    alone = holds(as_json(*command), schemas.EVAL)["efficiency"]
    assert alone["batches"][0]["baseline"] is None
    assert as_json("eval", other, *text)["efficiency"] is None


def test_what_cannot_be_timed(tiny_model: MakeModel, tmp_path: Any) -> None:
    text = ("--dataset", text_file(tmp_path, 300), "--windows", 2, "--seqlen", 16, "--efficiency")
    command = ("eval", tiny_model("llama"), *text)
    message, _ = fail(*command, "--batch-sizes", "1,0", code=2)
    assert "--batch-sizes 0 must be greater" in message
    message, hint = fail(*command, "--prompt-tokens", 120, "--new-tokens", 9, code=2)
    assert "exceed the 128 positions" in message
    assert "128 or less" in hint
    message, _ = fail(*command, "--new-tokens", 128, code=2)
    assert "exceed the 128 positions" in message
