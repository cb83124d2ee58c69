"""The safetensors files that are written and joined here, against the safetensors package."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hisvd_cli.utils.errors import OutputError, SourceError, reason
from hisvd_cli.utils.files.atomic import replacing, write_text
from hisvd_cli.utils.files.json_files import write_json
from hisvd_cli.utils.files.tensorfile import join_files, read_header, read_tensors, write_tensors
from tests.models import names

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(3, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
    "d": torch.tensor(7),
}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_header_says_what_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"key": "value"})
    header = read_header(path)
    assert header.metadata == {"key": "value"}
    data = path.read_bytes()
    for name, tensor in load_file(path).items():
        info = header.tensors[name]
        assert (info.shape, f"torch.{info.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        assert data[info.start : info.end] == bytes(flat.tolist())
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)


def damaged_files() -> Iterator[bytes]:
    good = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    size = len(good).to_bytes(8, "little")
    yield b""
    yield size[:7]
    yield size + good  # the header alone
    yield size + good + b"123"
    yield size + good + b"12345"
    yield (1 << 62).to_bytes(8, "little") + good
    for header in (b"[]", b"null", b"{", b'{"a": 1}', b'{"a": {"dtype": [], "shape": 1}}', b"\xff"):
        yield len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("content", list(damaged_files()))
def test_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.safetensors") as caught:
        read_header(path)
    assert caught.value.hint
    with pytest.raises(SourceError, match=r"x\.safetensors"):
        read_tensors(path, "Make it again.")


def test_missing_files_are_named(tmp_path: Path) -> None:
    for read in (read_header, lambda path: read_tensors(path, "Make it again.")):
        with pytest.raises(SourceError, match=r"x\.safetensors: No such file"):
            read(tmp_path / "x.safetensors")


def test_written_tensors_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    write_tensors(path, {**TENSORS, "t": TENSORS["a"].T}, {"key": "value"})
    tensors, metadata = read_tensors(path, "")
    assert_equal(tensors, {**TENSORS, "t": TENSORS["a"].T.contiguous()})
    assert metadata == {"key": "value"}
    assert names(path.parent) == ["x.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_user_wants(mask: int, tmp_path: Path) -> None:
    """safetensors itself writes files that only their owner reads."""
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "x", TENSORS, {})
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask
        assert os.umask(mask) == mask  # asking for the mask has not changed it
    finally:
        os.umask(before)


def fill_disk(path: Path) -> None:
    path.write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(OutputError, match="No space left") as caught, replacing(path) as temporary:
        fill_disk(temporary)
    assert "Free some space" in caught.value.hint
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"Not a directory|File exists"):
        write_json(tmp_path / "file" / "x.json", {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write_tensors(small_disk / "x.safetensors", {"a": torch.zeros(100_000)}, {})
    assert "Free some space" in caught.value.hint
    assert names(small_disk) == []
    with pytest.raises(OutputError, match="No space left on device"):
        write_text(small_disk / "x.txt", "x" * 100_000)
    assert names(small_disk) == []
    save_file({"a": torch.zeros(20_000)}, small_disk.parent / "part")
    with pytest.raises(OutputError, match="No space left on device"):
        join_files([small_disk.parent / "part"], small_disk / "joined", {})
    assert names(small_disk) == []


def test_joined_files_hold_all_tensors(tmp_path: Path) -> None:
    parts = {
        "1": {"narrow": torch.arange(3).bfloat16(), "wide": torch.arange(5.0)},
        "2": {},
        "3": {"long": torch.arange(4), "empty": torch.zeros(0)},
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    joined = tmp_path / "joined.safetensors"
    join_files([tmp_path / name for name in parts], joined, {"format": "pt"})
    expected = {key: t for tensors in parts.values() for key, t in tensors.items()}
    assert_equal(load_file(joined), expected)
    with safe_open(joined, framework="pt") as file:
        assert file.metadata().items() >= {"format": "pt"}.items()
    assert read_header(joined).metadata == {"format": "pt"}
    for name, info in read_header(joined).tensors.items():  # what readers that map files rely on
        assert info.start % expected[name].element_size() == 0


def test_joining_a_damaged_part_names_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "part")
    (tmp_path / "part").write_bytes((tmp_path / "part").read_bytes()[:-1])
    with pytest.raises(SourceError, match="part has"):
        join_files([tmp_path / "part"], tmp_path / "joined", {})
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device."),
        (ValueError("first line\nsecond line"), "first line."),
        (ValueError("What is it?"), "What is it?"),
        (ValueError(), "ValueError."),
    ],
)
def test_reasons_are_one_line(error: Exception, expected: str) -> None:
    assert reason(error) == expected
