"""Statistics of experts against a forward pass of the test's own, over the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from hisvd_cli.calibration.calibrate import calibrate
from hisvd_cli.calibration.gradients import measure_gradients
from hisvd_cli.calibration.routing import pooled
from hisvd_cli.calibration.store import Calibration, Sample
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.progress import Silent
from tests.architectures.case import load_whole
from tests.architectures.registry import architectures
from tests.architectures.tiny import save

NAMES = ("qwen3_moe", "gpt_oss", "llama4_text")
LENGTH = 32
RUN: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "batch": 3}
MANY, FEW = 13, 2
"""Sequences: of many, most experts get more tokens than twice their width, of few, none does."""


def sample(count: int) -> Sample:
    tokens = torch.randint(1, 2000, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    return Sample(tokens, "random", "file", "0" * 64, seed=0)


@dataclass
class Seen:
    """What an expert's matrix received: R rows of T tokens, and the gradient at its output.

    Attributes:
        weight: ``[m, n]``.
        x: ``[R, n]``.
        p: factors by which the expert's output is multiplied ``[R]``.
        tokens: indices of the rows ``[R]``.
        y: ``[R, m]``, which receives the gradient.
    """

    weight: Tensor
    x: Tensor
    p: Tensor
    tokens: Tensor
    y: Tensor = field(repr=False)

    def rows(self, half: int | None) -> Tensor:
        """Return a mask of the rows of even (0), odd (1) or all sequences."""
        return (
            torch.full_like(self.p, True, dtype=torch.bool)
            if half is None
            else (self.tokens // LENGTH % 2 == half)
        )

    def moment(self, total: int, half: int | None = None) -> Tensor:
        """Return G = Σ p² x xᵀ / T in float64."""
        kept = self.rows(half)
        x = (self.x * self.p[:, None])[kept].detach().double()
        return x.T @ x / total

    def gradient(self, share: float = 1, half: int | None = None) -> Tensor:
        """Return H = Σ g gᵀ / Σ p² in float64, or Wᵀ H W if that is smaller."""
        assert self.y.grad is not None
        g = self.y.grad[self.rows(half)].double()
        m, n = self.weight.shape
        g = g @ self.weight.double() if m > n else g
        return g.T @ g / (share * max(float(self.p.double().square().sum()), 1e-300))


Matrices = dict[str, list[Seen]]


def experts_of(module: Any, name: str, seen: Matrices, *given: Tensor, **more: Tensor) -> Tensor:
    """Compute what a module of experts does, matrix by matrix, and note each one's rows."""
    states, *rest = (*given, *more.values())
    count, is_llama = len(module.gate_up_proj), not rest
    own = states.view(count, -1, states.shape[-1])
    out = torch.zeros_like(states)
    for i in range(count):
        up, down = module.gate_up_proj[i], module.down_proj[i]
        if up.shape[0] == states.shape[-1]:  # transposed
            up, down = up.T, down.T
        if is_llama:
            tokens = torch.where(own[i].abs().sum(-1) > 0)[0]
            x, p = own[i][tokens], torch.ones(len(tokens))
        else:
            choice, weights = rest
            tokens, place = torch.where(choice == i)
            x, p = states[tokens], weights[tokens, place]
        y = noted(seen, f"{name}.gate_up_proj", up, x, p, tokens)
        if hasattr(module, "gate_up_proj_bias"):
            h = module._apply_gate(y + module.gate_up_proj_bias[i])
        else:
            gate, value = y.chunk(2, dim=-1)
            h = module.act_fn(gate) * value
        z = noted(seen, f"{name}.down_proj", down, h, p, tokens)
        if hasattr(module, "down_proj_bias"):
            z = z + module.down_proj_bias[i]
        place_of = tokens + i * len(states) // count if is_llama else tokens
        out = out.index_add(0, place_of, z * p[:, None])
    return out


def noted(
    seen: Matrices, name: str, weight: Tensor, x: Tensor, p: Tensor, tokens: Tensor
) -> Tensor:
    y = F.linear(x, weight)
    y.requires_grad_() if not y.requires_grad else None
    y.retain_grad()
    found = Seen(weight.detach(), x.detach(), p.detach(), tokens.detach(), y)
    seen.setdefault(name, []).append(found)
    return y


@dataclass
class Measured:
    """A calibration with gradients, and what the test found on the same tokens."""

    calibration: Calibration
    seen: Matrices
    tokens: int
    samples: int

    @property
    def share(self) -> float:
        """Share of the sequences of even number."""
        return (self.samples + 1) // 2 / self.samples


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Measured]:
    made: dict[tuple[str, int], Measured] = {}

    def measure(name: str, count: int) -> Measured:
        if (name, count) not in made:
            folder = tmp_path_factory.mktemp(name)
            save(architectures()[name], folder / "model")
            made[name, count] = _measured(name, folder, sample(count))
        return made[name, count]

    return measure


def _measured(name: str, folder: Path, text: Sample) -> Measured:
    source, common = open_source(str(folder / "model")), {**RUN, "settings": {}}
    found = calibrate(source, text, folder / "c", **common, reporter=Silent(), keep_inputs=True)
    found = measure_gradients(source, text, found, **common, weights=False, reporter=Silent())
    model: Any = load_whole(architectures()[name], folder / "model")
    with torch.no_grad():
        wanted = model(input_ids=text.tokens, use_cache=False).logits
    seen: Matrices = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            module.forward = partial(experts_of, module, path, seen)
    logits = model(input_ids=text.tokens, use_cache=False).logits
    torch.testing.assert_close(logits.detach(), wanted, rtol=1e-4, atol=1e-4)
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), text.tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    return Measured(found, seen, text.tokens.numel(), len(text.tokens))


def close(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert float(error) < 1e-4, f"{what}: {float(error):.1e}"


def is_rare(each: Seen, width: int) -> bool:
    """Return whether an expert has too few tokens for moments of its own."""
    return len(each.p) < 2 * width


@pytest.mark.parametrize("name", NAMES)
def test_moments_and_gradients(name: str, measured: Callable[[str, int], Measured]) -> None:
    """Of the experts with enough tokens, and of both halves of the text."""
    of = measured(name, MANY)
    compared = 0
    for stack, experts in of.seen.items():
        found = of.calibration.statistics(int(stack.split(".")[2]), {"gradients"})
        for i, each in enumerate(experts):
            known, label = found[f"{stack}.{i}"], f"{stack}.{i}"
            m, n = each.weight.shape
            if is_rare(each, n):
                continue
            compared += 1
            assert known.moment
            assert known.gradient
            assert known.halves
            assert (known.moment.side, known.gradient.moment.side) == (
                "input",
                "input" if m > n else "output",
            )
            close(known.moment.matrix, each.moment(of.tokens), label)
            close(known.gradient.moment.matrix, each.gradient(), label)
            assert each.y.grad is not None
            square = float(each.y.grad.double().square().sum() / each.p.double().square().sum() / m)
            assert known.gradient.mean_square == pytest.approx(square, rel=1e-4)
            for half, part in enumerate(known.halves):
                share = 1 - of.share if half else of.share
                assert part.moment
                assert part.gradient
                close(part.moment.matrix, each.moment(round(share * of.tokens), half), label)
                close(part.gradient.moment.matrix, each.gradient(share, half), label)
    assert compared >= 4


@pytest.mark.parametrize("name", NAMES)
def test_rare_experts_share_moments(name: str, measured: Callable[[str, int], Measured]) -> None:
    """G in proportion to the expert's tokens; H per token, averaged over all."""
    of = measured(name, FEW)
    for stack, experts in of.seen.items():
        found = of.calibration.statistics(int(stack.split(".")[2]), {"gradients"})
        hits = torch.tensor([float(len(each.p)) for each in experts], dtype=torch.float64)
        own = [torch.stack([e.moment(of.tokens) for e in experts])]
        own.append(torch.stack([e.gradient() for e in experts]))
        common = [own[0].sum(0) / hits.sum(), torch.einsum("e,eij->ij", hits, own[1]) / hits.sum()]
        for i in range(len(experts)):
            known = found[f"{stack}.{i}"]
            assert known.moment
            assert known.gradient
            for matrix, each, all_of, scale in (
                (known.moment.matrix, own[0], common[0], max(float(hits[i]), 0.5)),
                (known.gradient.moment.matrix, own[1], common[1], 1.0),
            ):
                share = 1 - float(hits[i]) / (2 * len(all_of))
                assert 0 < share <= 1
                close(matrix, (1 - share) * each[i] + share * scale * all_of, f"{stack}.{i}")


@pytest.mark.parametrize("name", NAMES)
def test_halves_add_up_to_the_whole(name: str, measured: Callable[[str, int], Measured]) -> None:
    """The halves of rare experts too."""
    for count in (MANY, FEW):
        of = measured(name, count)
        for stack in of.seen:
            found = of.calibration.statistics(int(stack.split(".")[2]), {"gradients"})
            for i in range(len(of.seen[stack])):
                whole = found[f"{stack}.{i}"]
                assert whole.moment
                assert whole.gradient
                assert whole.halves
                even, odd = whole.halves
                assert even.moment
                assert odd.moment
                assert even.gradient
                assert odd.gradient
                for total, one, other in (
                    (whole.moment, even.moment, odd.moment),
                    (whole.gradient.moment, even.gradient.moment, odd.gradient.moment),
                ):
                    mixed = of.share * one.matrix + (1 - of.share) * other.matrix
                    close(total.matrix, mixed.double(), stack)
                    for half in (one, other):
                        least = float(torch.linalg.eigvalsh(half.matrix.double())[0])
                        assert least > -1e-4 * float(half.matrix.diagonal().max())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_predicted_loss_is_the_change_of_the_output(
    name: str, measured: Callable[[str, int], Measured]
) -> None:
    """tr(Δ G Δᵀ) is the mean over the text of the squared change of a layer's output, if one
    expert's last matrix is truncated."""
    of = measured(name, MANY)
    for stack in (each for each in of.seen if each.endswith("down_proj")):
        found = of.calibration.moments(int(stack.split(".")[2]))
        for i, each in enumerate(of.seen[stack]):
            if is_rare(each, each.weight.shape[1]):
                continue
            u, s, v = torch.linalg.svd(each.weight.double(), full_matrices=False)
            change = (u[:, 9:] * s[9:]) @ v[9:]
            output = torch.zeros(of.tokens, len(change), dtype=torch.float64)
            rows = each.x.double() @ change.T * each.p.double()[:, None]
            output.index_add_(0, each.tokens, rows)
            measured_loss = float(output.square().sum(-1).mean())
            predicted = torch.trace(change @ found[f"{stack}.{i}"].matrix.double() @ change.T)
            assert float(predicted) == pytest.approx(measured_loss, rel=1e-4)


# Pooling


def moments(count: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(count, 40, width, generator=generator, dtype=torch.float64)
    return list(rows.mT @ rows)


def test_pooling_leaves_experts_with_enough_tokens() -> None:
    means = moments(3, 5)
    found = pooled(means, [10, 11, 1000], 5)
    assert all(torch.equal(a, b) for a, b in zip(found, means, strict=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_pooling_is_continuous(per_token: bool) -> None:
    """At 2n tokens and below, one token changes little."""
    means = moments(3, 50)
    curve = [pooled(means, [100, hits, 100], 50, per_token)[1] for hits in range(101)]
    assert torch.equal(curve[100], means[1])
    steps = [float((a - b).norm() / means[1].norm()) for a, b in pairwise(curve)]
    assert max(steps) < 0.03
    assert float((curve[0] - means[1]).norm() / means[1].norm()) > 0.3


def test_an_expert_without_tokens() -> None:
    one, other, _ = moments(3, 4)
    none = torch.zeros(4, 4, dtype=torch.float64)
    found = pooled([one, none, other], [30, 0, 10], 4)
    torch.testing.assert_close(found[1], 0.5 / 40 * (one + other))
    found = pooled([one, none, other], [30, 0, 10], 4, per_token=True)
    torch.testing.assert_close(found[1], (30 * one + 10 * other) / 40)


def test_no_expert_with_tokens() -> None:
    none = torch.zeros(4, 4)
    for per_token in (False, True):
        assert all(torch.equal(each, none) for each in pooled([none] * 2, [0, 0], 4, per_token))
