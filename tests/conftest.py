"""What all tests share: an own cache, no network, and tiny models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the library in this process takes for the real one, and a token for it."""
    from huggingface_hub import constants

    from tests.fake_hub import TOKEN, fake_hub

    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
