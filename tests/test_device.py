"""What ``auto`` means, and names that are no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils import dtype_speed
from hisvd_cli.utils.device import pick_device, pick_dtype
from hisvd_cli.utils.errors import UsageError
from hisvd_cli.utils.files.fingerprints import cache_root
from tests.cli_helpers import as_json

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "xpu:7", "cpu:x"])
def test_devices_that_are_not(name: str) -> None:
    with pytest.raises(UsageError, match=f"Device '{name}' is not available") as caught:
        pick_device(name)
    assert "`model.device`" in caught.value.hint


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Seconds of a product by dtype, in place of a measurement; float32 takes one."""
    seconds = {torch.bfloat16: 0.5, torch.float16: 0.5}
    monkeypatch.setattr(dtype_speed, "_known", {})
    monkeypatch.setattr(dtype_speed, "_times", lambda dtype, _device: (seconds[dtype], 1.0))
    monkeypatch.setattr(dtype_speed, "_machine", lambda device: {"device": device.type})
    return seconds


@pytest.mark.parametrize(
    ("name", "stored", "device", "expected"),
    [
        ("auto", "bfloat16", CPU, torch.bfloat16),
        ("auto", "float32", GPU, torch.float32),
        ("auto", "float16", GPU, torch.float16),
        ("auto", "float16", CPU, torch.float32),
        ("auto", "float8_e4m3fn", GPU, torch.float32),
        ("auto", "F4", CPU, torch.float32),
        ("float16", "float32", CPU, torch.float16),
    ],
)
@pytest.mark.usefixtures("speeds")
def test_dtypes(name: str, stored: str, device: torch.device, expected: torch.dtype) -> None:
    assert pick_dtype(name, stored, device) == expected


@pytest.mark.parametrize("device", [CPU, GPU])
def test_auto_is_float32_where_half_precision_is_slower(
    device: torch.device, speeds: dict[torch.dtype, float]
) -> None:
    speeds.update({torch.bfloat16: 1.1, torch.float16: 1.1})
    assert pick_dtype("auto", "bfloat16", device) == torch.float32
    assert pick_dtype("auto", "float16", device) == torch.float32
    assert pick_dtype("bfloat16", "bfloat16", device) == torch.bfloat16  # as asked


def test_the_measurement_is_kept_for_the_next_process(
    speeds: dict[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dtype_speed.as_fast_as_float32(torch.bfloat16, CPU)
    monkeypatch.setattr(dtype_speed, "_known", {})
    speeds[torch.bfloat16] = 50.0
    assert dtype_speed.as_fast_as_float32(torch.bfloat16, CPU)
    (record,) = (cache_root() / "machine").iterdir()
    assert json.loads(record.read_text())["as_fast"] is True
    for damaged in ("", "[]", '{"as_fast": 1}', "\xff"):  # measured again
        monkeypatch.setattr(dtype_speed, "_known", {})
        record.write_text(damaged, encoding="latin-1")
        assert not dtype_speed.as_fast_as_float32(torch.bfloat16, CPU)


@pytest.mark.usefixtures("speeds")
def test_a_cache_that_cannot_be_written_costs_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / "file"))
    assert dtype_speed.as_fast_as_float32(torch.bfloat16, CPU)


def test_products_are_timed_in_both_dtypes() -> None:
    """Against torch's own flags of what the processor multiplies."""
    half, single = dtype_speed._times(torch.bfloat16, CPU)
    assert 0 < single < 1
    assert 0 < half < 10
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":  # emulated there
        assert half > 2 * single


@pytest.mark.slow
def test_all_passes_of_a_run_use_the_faster_dtype(here: Path) -> None:
    """On any processor: what was measured decides for calibration, gradients and evaluation."""
    kinds = {}
    for as_fast, dtype in ((True, "bfloat16"), (False, "float32")):
        record = dtype_speed._known
        record.clear()
        record["cpu", torch.bfloat16] = as_fast
        try:
            output = here / dtype
            sample = ("--samples", 2, "--seqlen", 16, "--windows", 1)
            made = as_json(
                *("compress", "--model", "demo", "--ratio", 0.6, "--preset", "best"),
                *(*sample, "--evaluate", "--output", output),
            )
            record_of = json.loads((output / "hisvd.json").read_text())
            assert made["dtype"] == record_of["calibration"]["dtype"] == dtype
            assert record_of["gradients"]["dtype"] == dtype
            assert made["stored_dtype"] == "bfloat16"
            evaluated = as_json("eval", output, "--windows", 1, "--seqlen", 32)
            assert evaluated["results"][0]["dtype"] == dtype
            kinds[dtype] = {i.dtype for i in open_source(str(output)).weights.infos.values()}
        finally:
            record.clear()
    assert kinds["bfloat16"] == kinds["float32"]  # what is stored does not hang on it
