"""Perplexity against a ten-line loop that shares no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hisvd_cli.data import Text, load_text
from hisvd_cli.errors import DataError
from hisvd_cli.evaluate import perplexity
from hisvd_cli.reporter import Silent
from hisvd_cli.source import DEMO_FOLDER, open_source


def _model() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    model.eval()
    return model


def _by_hand(text: str, seqlen: int, windows: int) -> float:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    model = _model()
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    losses = []
    for i in range(windows):
        window = ids[i * seqlen : (i + 1) * seqlen].unsqueeze(0)
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_independent_loop(batch: int) -> None:
    text = load_text("demo", "evaluation")
    result = perplexity(
        _model(),  # type: ignore[arg-type]
        open_source("demo"),
        text,
        seqlen=200,
        windows=4,
        batch=batch,
        reporter=Silent(),
    )
    assert result.perplexity == pytest.approx(_by_hand(text.content, 200, 4), rel=1e-4)
    assert (result.windows, result.seqlen, result.tokens) == (4, 200, 4 * 199)
    assert result.dataset_hash == text.digest


def test_a_window_that_is_not_finite_spoils_the_result_and_is_named() -> None:
    class Spoiled(torch.nn.Module):
        device = torch.device("cpu")
        calls = 0

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:  # noqa: ARG002
            logits = torch.zeros(*input_ids.shape, 4096)
            if self.calls == 1:
                logits[0, 3] = float("nan")
            self.calls += 1
            return type("Output", (), {"logits": logits})

    result = perplexity(
        Spoiled(),  # type: ignore[arg-type]
        open_source("demo"),
        load_text("demo", "evaluation"),
        seqlen=16,
        windows=3,
        batch=1,
        reporter=Silent(),
    )
    assert result.perplexity is None
    assert result.nonfinite_windows == [1]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="too few for one window of 512"):
        perplexity(
            _model(),  # type: ignore[arg-type]
            open_source("demo"),
            Text("short", "file", "In the beginning"),
            seqlen=512,
            windows=0,
            batch=1,
            reporter=Silent(),
        )
