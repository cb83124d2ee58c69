"""What ``auto`` means, and names that are no device."""

from __future__ import annotations

import pytest
import torch

from hisvd_cli.device import pick_device, pick_dtype
from hisvd_cli.errors import UsageError

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
    with pytest.raises(UsageError, match=f"no device '{name}' here") as caught:
        pick_device(name)
    assert "--device" in caught.value.hint


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
def test_dtypes(name: str, stored: str, device: torch.device, expected: torch.dtype) -> None:
    assert pick_dtype(name, stored, device) == expected
