"""Gradients block by block against autograd over the whole model at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from hisvd_cli.calibration.block_inputs import INPUTS
from hisvd_cli.calibration.calibrate import STATE_SECONDS, calibrate
from hisvd_cli.calibration.gradients import measure_gradients
from hisvd_cli.calibration.store import GRADIENTS, Calibration, Sample, open_calibration
from hisvd_cli.linalg.statistics import Statistics
from hisvd_cli.modeling.block_walk import BlockWalk
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import NumericalError, SourceError
from hisvd_cli.utils.progress import Silent
from tests.conftest import MakeModel
from tests.models import CONFIGS, load_dense, names, random_tokens

CPU = torch.device("cpu")
TOKENS = random_tokens(5, 24)
SAMPLE = Sample(TOKENS, "random", "file", "0" * 64, seed=0)
Matrix = npt.NDArray[np.float64]


def calibrated(model: Path, folder: Path, keep_inputs: bool = False) -> Calibration:
    return calibrate(
        open_source(str(model)),
        SAMPLE,
        folder,
        device=CPU,
        dtype=torch.float32,
        batch=2,
        settings={},
        reporter=Silent(),
        keep_inputs=keep_inputs,
    )


def add_gradients(
    model: Path,
    calibration: Calibration,
    *,
    weights: bool = False,
    dtype: torch.dtype = torch.float32,
    state_seconds: float = STATE_SECONDS,
    reporter: Any = None,
) -> Calibration:
    return measure_gradients(
        open_source(str(model)),
        SAMPLE,
        calibration,
        device=CPU,
        dtype=dtype,
        batch=2,
        weights=weights,
        settings={},
        reporter=reporter or Silent(),
        state_seconds=state_seconds,
    )


def whole_gradients(model: Any) -> dict[str, list[Matrix]]:
    """Return name → per sequence, the gradient at the linear's output ``[L, m]`` and its input."""
    found: dict[str, list[Matrix]] = {}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n
    }
    for name, linear in linears.items():

        def watch(_m: object, args: Any, out: Tensor, name: str = name) -> None:
            out.retain_grad()
            kept[name] = (args[0], out)

        linear.register_forward_hook(watch)
    for ids in TOKENS:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        for name, (x, out) in kept.items():
            assert out.grad is not None
            # OPT hands its linears all tokens in one row.
            pair = [t.detach().flatten(0, -2).double().numpy() for t in (out.grad, x)]
            found.setdefault(name, []).append(np.concatenate(pair, axis=1))
    return found


def close(found: Tensor, expected: Matrix, tolerance: float = 1e-4) -> bool:
    scale = np.abs(expected).max()
    return bool(np.abs(found.double().numpy() - expected).max() <= tolerance * scale and scale > 0)


@pytest.mark.parametrize("arch", CONFIGS)
def test_gradients_are_those_of_the_whole_model(
    arch: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    folder = tiny_model(arch)
    made = add_gradients(folder, calibrated(folder, tmp_path / "c"), weights=True)
    model = load_dense(folder)
    expected = whole_gradients(model)
    seen = set()
    for layer in range(model.config.num_hidden_layers):
        for name, each in made.statistics(layer, {"weight-gradients"}).items():
            assert each.gradient is not None
            assert each.weight_gradients is not None
            weight = model.get_submodule(name).weight.detach().double().numpy()
            m, n = weight.shape
            rows = np.concatenate(expected[name])[:, :m]
            assert each.gradient.moment.side == ("input" if m > n else "output")
            narrow = rows @ weight if m > n else rows
            assert close(each.gradient.moment.matrix, narrow.T @ narrow / len(rows)), name
            assert each.gradient.mean_square == pytest.approx(np.square(rows).mean(), rel=1e-4)
            check_halves(each, weight, expected[name], name)
            whole = [pair[:, :m].T @ pair[:, m:] for pair in expected[name]]
            parts = each.weight_gradients
            assert close(parts.mean, np.mean(whole, axis=0)), name
            assert close(parts.output, np.mean([d @ d.T for d in whole], axis=0)), name
            assert close(parts.input, np.mean([d.T @ d for d in whole], axis=0)), name
            seen.add(name)
    assert seen == expected.keys()


def check_halves(found: Statistics, weight: Matrix, pairs: list[Matrix], name: str) -> None:
    """Sequences of even number, and the rest, have moments of their own."""
    assert found.halves is not None
    m, n = weight.shape
    for half, kept in zip(found.halves, (pairs[0::2], pairs[1::2]), strict=True):
        assert half.moment is not None
        assert half.gradient is not None
        g, x = np.hsplit(np.concatenate(kept), [m])
        narrow = g @ weight if m > n else g
        seen = x if half.moment.side == "input" else x @ weight.T
        assert close(half.gradient.moment.matrix, narrow.T @ narrow / len(g)), name
        assert close(half.moment.matrix, seen.T @ seen / len(x)), name


def test_one_sequence_has_no_halves(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    one = replace(SAMPLE, tokens=TOKENS[:1])
    source = open_source(str(folder))
    running: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "batch": 2, "settings": {}}
    calibration = calibrate(source, one, tmp_path / "c", **running, reporter=Silent())
    made = measure_gradients(source, one, calibration, **running, weights=False, reporter=Silent())
    assert all(each.halves is None for each in made.statistics(0, {"gradients"}).values())


def test_inputs_kept_while_calibrating_spare_the_forward_walk(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    plain = add_gradients(folder, calibrated(folder, tmp_path / "plain"))
    kept = calibrated(folder, tmp_path / "kept", keep_inputs=True)
    assert (tmp_path / "kept" / INPUTS).is_dir()
    monkeypatch.setattr(BlockWalk, "advance", None)
    again = add_gradients(folder, kept)
    assert not (tmp_path / "kept" / INPUTS).exists()
    for one, other in zip(files(plain), files(again), strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def files(calibration: Calibration) -> list[Path]:
    return sorted((calibration.folder / GRADIENTS).iterdir())


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("state_seconds", [0.0, 1e9])
def test_an_interrupted_run_goes_on(
    steps: int, state_seconds: float, tiny_model: MakeModel, tmp_path: Path
) -> None:
    """Stopped after each step of each stage: the rerun gives the same bytes."""
    folder = tiny_model("llama")
    whole = add_gradients(folder, calibrated(folder, tmp_path / "whole"), weights=True)
    stopped = calibrated(folder, tmp_path / "stopped")
    left = itertools.count(1)

    class Stopping(Silent):
        def stage(self, label: str, total: int) -> Any:
            context = super().stage(label, total)
            del context
            return _Counting(left, steps)

    with pytest.raises(_StoppedError):
        add_gradients(
            folder, stopped, weights=True, state_seconds=state_seconds, reporter=Stopping()
        )
    assert open_calibration(stopped.folder).gradients is None
    resumed = add_gradients(folder, stopped, weights=True)
    for one, other in zip(files(whole), files(resumed), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert names(stopped.folder) == names(whole.folder)


@dataclass
class _Counting:
    """A stage that stops the run at its n-th step over all stages."""

    left: itertools.count[int]
    steps: int
    inner: list[None] = field(default_factory=list)

    def __enter__(self) -> Any:
        def step() -> None:
            if next(self.left) >= self.steps:
                raise _StoppedError

        return step

    def __exit__(self, *_error: object) -> None:
        self.inner.append(None)


def test_float16_walks_back_in_float32(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    made = add_gradients(folder, calibrated(folder, tmp_path / "c"), dtype=torch.float16)
    assert made.gradients is not None
    assert made.gradients["dtype"] == "float32"


def test_a_zero_gradient_is_told_by_sublayer(tiny_model: MakeModel, tmp_path: Path) -> None:
    source = open_source(str(tiny_model("llama")))
    read = source.weights.read
    warned: list[str] = []

    class Warned(Silent):
        def warn(self, message: str) -> None:
            warned.append(message)

    folder = tiny_model("llama")
    calibration = calibrated(folder, tmp_path / "c")

    def dead(name: str) -> Tensor:
        tensor = read(name)
        return torch.zeros_like(tensor) if name == "model.layers.1.mlp.down_proj.weight" else tensor

    object.__setattr__(source.weights, "read", dead)
    made = measure_gradients(
        source,
        SAMPLE,
        calibration,
        device=CPU,
        dtype=torch.float32,
        batch=2,
        weights=False,
        settings={},
        reporter=Warned(),
    )
    assert made.gradients is not None
    # What comes before a zero matrix in its branch has no influence on the loss.
    assert {text.split()[6] for text in warned} == {
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_a_loss_that_is_not_finite_is_refused(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    calibration = calibrated(folder, tmp_path / "c")
    monkeypatch.setattr(BlockWalk, "reverse", lambda _s, _i, _n, part, _g: part * float("nan"))
    monkeypatch.setattr(
        "hisvd_cli.calibration.gradient_collector.GradientCollector.means", _nan_means
    )
    with pytest.raises(NumericalError, match="NaN"):
        add_gradients(folder, calibration)
    assert open_calibration(calibration.folder).gradients is None


def _nan_means(collector: Any) -> dict[str, Tensor]:
    return {f"{name}.square": torch.tensor(float("nan")) for name in collector._linears}


def test_without_gradients_a_method_names_the_command(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    calibration = calibrated(tiny_model("llama"), tmp_path / "c")
    with pytest.raises(SourceError, match="'fisher' needs gradients") as caught:
        calibration.require({"gradients"}, "fisher")
    assert "hisvd calibrate --gradients" in caught.value.hint
    assert calibration.holds == {"moments"}
