"""Text that the model writes itself, against the model's own distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hisvd_cli.calibration.text.self_text import ROWS, sample_self
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import NumericalError
from hisvd_cli.utils.files.fingerprints import cache_root
from hisvd_cli.utils.progress import Silent
from tests.conftest import MakeModel
from tests.models import BOS, edit_json, load_dense, save_model


def sample(folder: Path, samples: int = 20, seqlen: int = 9, seed: int = 0) -> Tensor:
    return sample_self(
        open_source(str(folder)),
        samples,
        seqlen,
        seed,
        device=torch.device("cpu"),
        dtype=torch.float32,
        reporter=Silent(),
    )


def batches() -> list[Path]:
    return sorted((cache_root() / "self").rglob("batch-*.safetensors"))


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_tokens_follow_the_models_distribution(arch: str, tiny_model: MakeModel) -> None:
    folder = tiny_model(arch)
    drawn = sample(folder, samples=1600, seqlen=2)
    assert drawn.shape == (1600, 2)
    assert bool((drawn[:, 0] == BOS).all())
    with torch.no_grad():
        logits = load_dense(folder)(torch.tensor([[BOS]])).logits[0, -1]
    expected = 1600 * logits.double().softmax(-1).numpy()
    counts = np.bincount(drawn[:, 1].numpy(), minlength=len(expected))
    rare = expected < 5  # one bin for all of them, as the chi-square test needs
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    square = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom >= 3
    assert square < freedom + 4 * np.sqrt(2 * freedom)


def test_rows_are_full_and_go_on_after_the_end(tiny_model: MakeModel) -> None:
    """The tiny models' end token is their first: it comes again, and stops nothing."""
    drawn = sample(tiny_model("llama"), samples=32, seqlen=60)
    assert drawn.shape == (32, 60)
    assert drawn.dtype == torch.int64
    ends = (drawn[:, 1:-1] == BOS).nonzero()
    assert len(ends)
    after = torch.stack([drawn[row, place + 2] for row, place in ends.tolist()])
    assert bool((after != BOS).any())


def test_the_cache_spares_the_model(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama")
    drawn = sample(folder, samples=ROWS + 3)
    assert len(batches()) == 2
    monkeypatch.setattr("hisvd_cli.calibration.text.self_text.load_source", None)
    assert torch.equal(sample(folder, samples=ROWS + 3), drawn)


def test_a_lost_batch_is_drawn_again(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    drawn = sample(folder, samples=2 * ROWS)
    first, second = batches()
    first.unlink()
    second.write_bytes(b"damaged")
    assert torch.equal(sample(folder, samples=2 * ROWS), drawn)
    assert not torch.equal(drawn[:ROWS], drawn[ROWS:])


def test_the_seed_decides(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    drawn = sample(folder)
    assert not torch.equal(sample(folder, seed=1), drawn)
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / "fresh"))
    state = torch.random.get_rng_state()
    assert torch.equal(sample(folder), drawn)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_a_model_ships_for_generating_does_not_matter(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    free = sample(folder)
    shipped = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.01}
    edit_json(folder / "generation_config.json", **shipped)
    for batch in batches():
        batch.unlink()
    assert torch.equal(sample(folder), free)


def test_a_model_that_overflows_is_an_error(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any) -> Any:
        model = load_dense(tiny_model("llama"))
        model.get_output_embeddings().weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr("hisvd_cli.calibration.text.self_text.load_source", broken)
    with pytest.raises(NumericalError, match="Cannot sample text"):
        sample(tiny_model("llama"))
    assert batches() == []
