"""The demo model and its text, as the references take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hisvd_cli.calibration.text.datasets import load_text
from hisvd_cli.calibration.text.tokens import sample_windows, tokenize
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import DEMO
from tests.references.common import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES, SEQLEN, SEED = 12, 128, 0


def demo_study() -> Study:
    """The demo model in float32 with 12 × 128 tokens of its calibration text."""
    source = open_source(DEMO)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32
    )
    tokens = tokenize(load_text(DEMO, "calibration"), source)
    return Study(model, sample_windows(tokens, SAMPLES, SEQLEN, SEED, DEMO))


def evaluation_windows() -> Tensor:
    """The first 12 windows of 128 tokens of its evaluation text."""
    tokens = tokenize(load_text(DEMO, "evaluation"), open_source(DEMO))
    return tokens[: SAMPLES * SEQLEN].view(SAMPLES, SEQLEN)
