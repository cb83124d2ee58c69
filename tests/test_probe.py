"""What the probe measures against the whole model with the weight replaced by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hisvd_cli.allocation.probe import ModelProbe
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.structure.sublayers import find_sublayers
from hisvd_cli.utils.progress import Silent
from tests.conftest import MakeModel
from tests.models import load_dense, random_tokens

WINDOWS = random_tokens(3, 20)
ARCHES = ["llama", "opt", "gemma2", "phi"]


def factors_of(model: Any) -> Callable[[str], tuple[Tensor, Tensor]]:
    def factors(name: str) -> tuple[Tensor, Tensor]:
        u, sigma, v = torch.linalg.svd(model.get_submodule(name).weight.double())
        k = len(sigma)
        return u[:, :k] * sigma, v[:k]

    return factors


def sublayers(model: Any) -> list[str]:
    decoder = model.get_decoder()
    prefix = next(n for n, m in model.named_modules() if m is decoder.layers)
    return [s.name for s in find_sublayers(prefix, list(decoder.layers))]


def probe_of(
    folder: Path,
    store: Path,
    model: Any,
    key: str = "key",
    members: dict[str, list[str]] | None = None,
) -> ModelProbe:
    return ModelProbe(
        open_source(str(folder)),
        members or {name: [name] for name in sublayers(model)},
        WINDOWS,
        factors_of(model),
        device=torch.device("cpu"),
        dtype=torch.float32,
        store=store,
        key=key,
        reporter=Silent(),
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=WINDOWS, use_cache=False).logits.double()
    return found


def truncated(folder: Path, name: str, rank: int) -> Any:
    model = load_dense(folder)
    u, v = factors_of(model)(name)
    model.get_submodule(name).weight.data = (u[:, :rank] @ v[:rank]).float()
    return model


def divergence(dense: Tensor, other: Tensor) -> float:
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("arch", ARCHES)
def test_answers_are_those_of_the_whole_model(
    arch: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tiny_model(arch)
    model = load_dense(folder)
    probe = probe_of(folder, tmp_path / "measured.json", model)
    names = sublayers(model)
    for name in (names[0], names[len(names) // 2], names[-1]):
        other = logits(truncated(folder, name, 5))
        expected = divergence(logits(model), other)
        assert expected > 1e-6
        assert probe.divergence(name, 5) == pytest.approx(expected, rel=1e-3)
        loss = nn.functional.cross_entropy(other[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
        assert probe.perplexity(name, 5) == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_members_of_a_stack_are_truncated_together(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Two layers of a block stand for the experts of a stack."""
    folder = tiny_model("llama")
    model = load_dense(folder)
    names = [name for name in sublayers(model) if ".1.mlp." in name][:2]
    stack = names[0].rpartition(".")[0] + ".experts"
    probe = probe_of(folder, tmp_path / "one.json", model, members={stack: names})
    other = load_dense(folder)
    for name in names:
        u, v = factors_of(model)(name)
        other.get_submodule(name).weight.data = (u[:, :5] @ v[:5]).float()
    expected = divergence(logits(model), logits(other))
    assert probe.divergence(stack, 5) == pytest.approx(expected, rel=1e-3)
    # One position for both: its gradient is the sum of those of two equal positions.
    apart = probe_of(folder, tmp_path / "two.json", model, members={n: [n] for n in names})
    loss, slopes = apart.soft_divergence([6.0, 6.0], 0.05, 0)
    together, (slope,) = probe.soft_divergence([6.0], 0.05, 0)
    assert together == pytest.approx(loss, rel=1e-5)
    assert slope == pytest.approx(sum(slopes), rel=1e-4)
    assert min(map(abs, slopes)) > 0


def test_a_sublayer_has_its_weight_again(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    model = load_dense(folder)
    name = sublayers(model)[0]
    probe = probe_of(folder, tmp_path / "measured.json", model)
    probe.divergence(name, 3)
    assert probe._loaded is not None
    torch.testing.assert_close(probe._loaded.linear(name).weight, model.get_submodule(name).weight)
    monkeypatch.setattr(type(probe._loaded), "perplexity", _fail)
    with pytest.raises(ZeroDivisionError):
        probe.perplexity(name, 3)
    torch.testing.assert_close(probe._loaded.linear(name).weight, model.get_submodule(name).weight)


def _fail(*_args: object) -> float:
    return 1 / 0


def test_answers_are_kept_on_disk(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    model = load_dense(folder)
    name, store = sublayers(model)[3], tmp_path / "measured.json"
    first = probe_of(folder, store, model).divergence(name, 4)
    monkeypatch.setattr("hisvd_cli.allocation.probe.load_source", None)
    assert probe_of(folder, store, model).divergence(name, 4) == first
    with pytest.raises(TypeError):  # another key, another rank: both need the model
        probe_of(folder, store, model, key="other").divergence(name, 4)
    with pytest.raises(TypeError):
        probe_of(folder, store, model).divergence(name, 5)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_soft_divergence_has_the_gradient_of_its_differences(
    arch: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tiny_model(arch)
    model = load_dense(folder)
    probe = probe_of(folder, tmp_path / "measured.json", model)
    positions = [12.0 + i % 5 for i in range(len(sublayers(model)))]
    positions[2] = math.inf
    _, gradient = probe.soft_divergence(positions, 0.1, step=4)
    assert gradient[2] == 0.0
    for i in (0, 5, len(positions) - 1):
        losses = []
        for shift in (-0.5, 0.5):
            moved = [p + shift * (j == i) for j, p in enumerate(positions)]
            losses.append(probe.soft_divergence(moved, 0.1, step=4)[0])
        assert gradient[i] == pytest.approx(losses[1] - losses[0], rel=0.05, abs=1e-5)


def test_soft_divergence_is_that_of_the_masked_model(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    model = load_dense(folder)
    dense = logits(model)[1:2]
    factors = factors_of(model)
    positions = [9.0 + i % 7 for i in range(len(sublayers(model)))]
    for name, position in zip(sublayers(model), positions, strict=True):
        u, v = factors(name)
        index = torch.arange(v.shape[0])
        mask = 1 / (1 + torch.exp(-(position - index - 0.5) / (0.05 * len(v))))
        model.get_submodule(name).weight.data = (u @ (mask[:, None] * v)).float()
    expected = divergence(dense, logits(model)[1:2])
    found, _ = probe_of(folder, tmp_path / "m.json", load_dense(folder)).soft_divergence(
        positions, 0.05, step=1
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_all_dense_diverges_by_nothing(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    model = load_dense(folder)
    probe = probe_of(folder, tmp_path / "measured.json", model)
    loss, gradient = probe.soft_divergence([math.inf] * len(sublayers(model)), 0.1, step=0)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert not any(gradient)
