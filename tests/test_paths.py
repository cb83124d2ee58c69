"""Where things are kept, and the hashes that name them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hisvd_cli.utils.errors import SourceError, UsageError
from hisvd_cli.utils.files.fingerprints import cache_root, digest, file_digest, slug


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HISVD_CACHE", "~/mine")
    assert cache_root() == Path("/home/me/mine")
    monkeypatch.delenv("HISVD_CACHE")
    assert cache_root() == Path("/xdg/hisvd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/me/.cache/hisvd")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/models/my model/", "my-model"),
        ("x/model.Q4_1.gguf", "model.Q4-1"),
        ("demo", "demo"),
        (".", "model"),
        ("..", "model"),
        ("/", "model"),
    ],
)
def test_slugs_are_short_file_names(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_digests_keep_their_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab") == digest(b"ab")
    assert digest("ab") == hashlib.sha256(b"2:ab").hexdigest()


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one" * 1_000_000)
    value = file_digest(path)
    assert value == hashlib.sha256(path.read_bytes()).hexdigest()
    (record,) = (cache_root() / "digests").iterdir()
    record.write_text("remembered".ljust(64, "."))
    assert file_digest(path) == record.read_text()
    stat = path.stat()
    path.write_bytes(b"two" * 1_000_000)  # the same size, and the same time as far as it can be set
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest() != value


def test_files_that_cannot_be_read_or_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match=r"Cannot read .*x: No such file"):
        file_digest(tmp_path / "x")
    (tmp_path / "x").touch()
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / "x"))
    # A cache that cannot be written only costs the hash again.
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"").hexdigest()


def test_a_cache_of_an_unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISVD_CACHE", "~nosuchuser/cache")
    with pytest.raises(UsageError, match="no user 'nosuchuser'"):
        cache_root()
