"""Every preset against an independent, straightforward implementation of its paper.

Both get the demo model, 12 × 128 tokens of its calibration text, and are measured on 12 × 128
tokens of its evaluation text. What each reference does is written in tests/references.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hisvd_cli  # noqa: F401  (makes from_pretrained read checkpoints of hisvd)
from hisvd_cli.pipelines.compressing.compression import compress_model
from hisvd_cli.pipelines.config.commands import Key
from hisvd_cli.pipelines.config.presets import PRESETS
from hisvd_cli.pipelines.config.resolution import resolve
from hisvd_cli.utils.progress import Silent
from tests.references import REFERENCES
from tests.references.asvd import WINDOWS
from tests.references.common import Ranks, Study, Sublayer, Weights, knapsack
from tests.references.demo import SAMPLES, SEED, SEQLEN, demo_study, evaluation_windows

RATIOS = (0.8, 0.6)
ALLOWED = 0.05
LONG = {"asvd", "dobi-svd", "gfwsvd", "lems"}
"""Presets, or references, that take many seconds."""

pytestmark = pytest.mark.xdist_group("references")  # what they share is measured once

CASES = [
    pytest.param(name, ratio, marks=[pytest.mark.slow] if name in LONG or ratio == 0.8 else [])
    for name, ratio in product(REFERENCES, RATIOS)
]


@pytest.fixture(scope="module")
def study() -> Study:
    """The demo model and its calibration windows, as the references take them."""
    torch.set_num_threads(1)
    return demo_study()


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library keeps the one calibration that all presets share."""
    return tmp_path_factory.mktemp("references") / "calibration"


@pytest.fixture(scope="module")
def evaluation() -> Tensor:
    """What both are measured on."""
    return evaluation_windows()


def compressed_perplexity(
    preset: str, ratio: float, calibration: Path, folder: Path, windows: Tensor
) -> float:
    """Compress the demo model by a preset through the library, load it, and measure it."""
    flags: dict[Key, object] = {
        ("model", "name"): "demo",
        ("model", "dtype"): "float32",
        ("model", "device"): "cpu",
        ("calibration", "samples"): SAMPLES,
        ("calibration", "seqlen"): SEQLEN,
        ("calibration", "seed"): SEED,
        ("calibration", "weight_gradients"): True,
        ("calibration", "path"): str(calibration),
        ("plan", "preset"): preset,
        ("plan", "ratio"): [ratio],
        ("compress", "evaluate"): False,
        # As the references: zs-svd's preset has six stages, svd-llm's updates at low ratios.
        ("compress", "stages"): 1,
        ("compress", "update"): "none",
    }
    if preset == "asvd":
        flags["plan", "probe_samples"] = WINDOWS
    resolved = resolve(flags, environ={}, start=folder)
    output = folder / "compressed"
    compress_model(resolved, output, None, False, Silent())
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    return Study(model, windows).perplexity(windows)


def kept_share(study: Study, weights: Weights, preset: str) -> float:
    """Share of the parameters that weights need as pairs, by their numerical rank."""
    price = Sublayer.pivoted_cost if preset == "best" else Sublayer.cost
    spent = 0
    for s in study.sublayers:
        rank = (
            int(torch.linalg.matrix_rank(weights[s.name], rtol=1e-8)) if s.name in weights else None
        )
        spent += price(s, rank)
    return spent / sum(s.dense_cost for s in study.sublayers)


def test_every_preset_has_a_reference() -> None:
    assert list(REFERENCES) == list(PRESETS)


@pytest.mark.parametrize(("preset", "ratio"), CASES)
def test_preset_is_level_with_its_reference(
    preset: str,
    ratio: float,
    study: Study,
    calibration: Path,
    evaluation: Tensor,
    tmp_path: Path,
) -> None:
    weights = REFERENCES[preset](study, ratio)
    assert ratio - 0.015 < kept_share(study, weights, preset) < ratio + 0.001
    expected = study.perplexity(evaluation, weights)
    assert expected > study.perplexity(evaluation)
    measured = compressed_perplexity(preset, ratio, calibration, tmp_path, evaluation)
    assert measured == pytest.approx(expected, rel=ALLOWED)


def test_knapsack_finds_the_least_loss() -> None:
    """Against all combinations, on a study of three small sublayers."""
    generator = torch.Generator().manual_seed(1)
    small = _small_study()
    losses = {
        s.name: {rank: float(torch.rand((), generator=generator)) for rank in (1, 2, 3, None)}
        for s in small.sublayers
    }
    for ratio in (0.5, 0.8, 1.0):
        budget = small.budget(ratio)
        sums: list[float] = []
        for choice in product((1, 2, 3, None), repeat=len(small.sublayers)):
            ranks: Ranks = dict(zip(losses, choice, strict=True))
            if sum(s.cost(ranks[s.name]) for s in small.sublayers) <= budget:
                sums.append(sum(losses[name][rank] for name, rank in ranks.items()))
        found = knapsack(small, losses, budget)
        assert sum(losses[n][r] for n, r in found.items()) == pytest.approx(min(sums))
        assert sum(s.cost(found[s.name]) for s in small.sublayers) <= budget


def _small_study() -> Study:
    blocks = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
        for m, n in ((8, 8), (8, 12), (12, 8))
    )
    return Study(torch.nn.Sequential(blocks), torch.zeros(1, 1, dtype=torch.long))  # type: ignore[arg-type]
