"""The Python API: what its results show."""

from __future__ import annotations

from pathlib import Path

import pytest

import hisvd_cli as hisvd
from tests.cli_helpers import as_json, fail, succeed

SMALL = ("--samples", 8, "--seqlen", 64)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> hisvd.Calibration:
    folder = tmp_path_factory.mktemp("results")
    return hisvd.calibrate(
        "demo", samples=8, seqlen=64, gradients=True, calibration=folder / "c", progress=False
    )


def test_a_plan_by_bytes_shows_bytes_and_bits(calibration: hisvd.Calibration) -> None:
    plan = hisvd.plan(calibration, bytes_ratio=0.3, progress=False)
    counted = plan.data.bytes
    assert counted is not None
    lines = succeed(
        *("plan", "--model", "demo", *SMALL, "--calibration", calibration.folder),
        *("--bytes-ratio", 0.3),
    ).stdout
    kept = f"{counted.kept / 1e6:.1f} MB of "
    assert kept in lines
    for shown in (repr(plan), plan._repr_html_()):
        assert kept in shown
        assert "bytes ratio" in shown
        assert "of the bytes kept" in shown
        low = list(plan.data.bits.values())
        assert f"int4 in {low.count(4)} layer" in shown
    assert "<th>4 bit</th>" in plan._repr_html_()
    assert "keep ratio" not in repr(plan)


def test_a_quantized_checkpoint_shows_size_and_bits(
    calibration: hisvd.Calibration, here: Path
) -> None:
    made = hisvd.compress(calibration, ratio=0.6, output="plain", evaluate=False, progress=False)
    rounded = hisvd.convert(made, quantize="int8", output="int8", progress=False)
    size = sum(path.stat().st_size for path in (here / "int8").glob("*.safetensors"))
    count = len(as_json("inspect", "int8")["sublayers"])
    for shown in (repr(rounded), rounded._repr_html_()):
        assert f"{size:,} bytes" in shown
        assert f"int8 in {count} layers" in shown
    assert "quantization" not in repr(made)
    single = hisvd.convert(made, to="pt", output="one.pt", progress=False)
    assert f"{(here / 'one.pt').stat().st_size:,} bytes" in repr(single)


def test_an_evaluation_shows_speeds(here: Path) -> None:
    assert here.is_dir()
    found = hisvd.evaluate(
        *("demo",), windows=1, seqlen=32, efficiency=True, batch_sizes=[1, 2], prompt_tokens=8,
        new_tokens=2, turns=1, progress=False,
    )  # fmt: skip
    speed = found.grid.evaluations[0].speed
    assert speed is not None
    rates = [f"{each.own.rate('decode'):.4g} tokens/s" for each in speed.speeds]
    assert len(rates) == 2
    assert all(f"decode {rate}" in repr(found) for rate in rates)
    page = found._repr_html_()
    assert "8 prompt tokens, 2 new tokens, 1 repetition;" in page
    assert page.count("<td>prefill</td>") == page.count("<td>decode</td>") == 2
    assert "<th>tokens/s</th>" in page


def test_missing_statistics_are_collected_for_a_plan(here: Path) -> None:
    assert here.is_dir()
    made = hisvd.plan("demo", preset="best", ratio=0.6, samples=8, seqlen=64, progress=False)
    again = hisvd.plan(
        hisvd.calibrate("demo", samples=8, seqlen=64, gradients=True, progress=False),
        **{"preset": "best", "ratio": 0.6, "progress": False},  # type: ignore[arg-type]
    )
    assert made.data.calibrated
    assert made.ranks == again.ranks


def test_the_command_line_says_how_to_collect_statistics(here: Path) -> None:
    assert here.is_dir()
    _, hint = fail("plan", "--model", "demo", "--samples", 8, "--preset", "best")
    assert hint == "Run: hisvd calibrate --model demo --samples 8 --gradients"


def test_a_calibration_shows_the_same_everywhere(calibration: hisvd.Calibration) -> None:
    assert "8 × 64 = 512" in repr(calibration)
    large = hisvd.calibrate("demo", samples=32, seqlen=64, progress=False)
    assert "= 2,048;" in repr(large)
    assert "= 2,048;" in repr(hisvd.inspect(large, progress=False))
    assert "= 2,048 " in succeed("inspect", large.folder).stdout
