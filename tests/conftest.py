"""What all tests share: an own cache, no network, and tiny models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# Read by the libraries when they are imported: so set first, and nothing above imports them.
_HOME = tempfile.TemporaryDirectory(prefix="hisvd-tests-")  # removed when Python ends
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers run beside each other: threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeModel = Callable[[str], Path]
CACHE = "hisvd-cache"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test leaves in hisvd's cache is seen by another one, or by the user."""
    monkeypatch.setenv("HISVD_CACHE", str(tmp_path / CACHE))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return folders with a tiny random model by architecture, each made once; do not edit them."""
    from tests.models import save_model

    return cache(lambda arch: save_model(arch, tmp_path_factory.mktemp("models") / arch))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
