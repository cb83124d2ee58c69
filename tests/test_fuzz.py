"""Mutated files through every reader: a result or an error that says what is wrong, nothing else.

``HISVD_FUZZ=2000`` draws so many examples a reader at random; without it there are a few, always
the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch import nn

from hisvd_cli.calibration.store import open_calibration
from hisvd_cli.calibration.text.datasets import load_instructions, load_text
from hisvd_cli.evaluation.perplexity import Sums
from hisvd_cli.evaluation.store import Store
from hisvd_cli.export.card_results import CardResult, update_card
from hisvd_cli.export.dense import to_dense
from hisvd_cli.inspection.pt_files import load_pt
from hisvd_cli.modeling.checkpoints.checkpoint import open_checkpoint
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.structure.skeleton import build_stored_model
from hisvd_cli.modeling.whole_model import load_model
from hisvd_cli.utils.errors import HisvdError
from tests.cli_helpers import hisvd, succeed, text_file
from tests.conftest import MakeModel
from tests.models import random_text
from tests.mutations import (
    Mutate,
    mutated_archive,
    mutated_bytes,
    mutated_head,
    mutated_header,
    mutated_json,
    mutated_lines,
)

EXAMPLES = int(os.environ.get("HISVD_FUZZ", "0"))
FEW = 8
_TEXTS = [random_text(20, seed) for seed in range(50)]


@dataclass(frozen=True)
class Reader:
    """A way to read: ``file``, below a folder of real files, is mutated, and ``read`` is given
    the path of ``target``, by default the file itself."""

    file: str
    mutate: Mutate
    read: Callable[[Path], object]
    target: str = ""
    slow: bool = False


def inspected(path: Path) -> None:
    """Inspect through the command line, so that what is shown of a file is tried as well."""
    run("inspect", path, "--verbose")


def run(*words: object) -> None:
    result = hisvd(*words)
    assert "Internal error" not in result.stderr, result.stderr
    assert "Out of memory" not in result.stderr, result.stderr
    assert result.exit_code in (0, 1, 2), result.exception


def text_read(path: Path) -> None:
    load_text(str(path), "calibration").content.encode()
    load_instructions(str(path))


def statistics_read(path: Path) -> None:
    found = open_calibration(path)
    found.statistics(0, {"moments"})
    found.importance(0)


def tokenizer_read(path: Path) -> None:
    open_source(str(path)).tokenizer("the words of a text")


def model_loaded(path: Path) -> None:
    load_model(path, torch.device("cpu"), torch.float32)


def model_built(path: Path) -> None:
    build_stored_model(open_source(str(path)), torch.float32)


def multiplied(path: Path) -> None:
    out = path.with_name("dense")
    shutil.rmtree(out, ignore_errors=True)
    to_dense(open_checkpoint(path), out, "key")


def card_updated(path: Path) -> None:
    update_card(path, [CardResult("text.txt", "perplexity", 3.0)])


def store_read(path: Path) -> None:
    store = Store(path.parent)
    store.load(path.stem)
    store.load_document(path.stem)


def profile_read(path: Path) -> None:
    run("plan", "--profile", path, "--show-profile")


READERS = {
    "model config": Reader("model/config.json", mutated_json, inspected, "model"),
    "model config, built": Reader("model/config.json", mutated_json, model_built, "model"),
    "model weights": Reader("model/model.safetensors", mutated_header, inspected, "model"),
    "model weights, bytes": Reader("model/model.safetensors", mutated_head, inspected, "model"),
    "tokenizer": Reader("model/tokenizer.json", mutated_json, tokenizer_read, "model"),
    "tokenizer config": Reader(
        "model/tokenizer_config.json", mutated_json, tokenizer_read, "model"
    ),
    "index": Reader("sharded/model.safetensors.index.json", mutated_json, inspected, "sharded"),
    "pickled weights": Reader("bin/pytorch_model.bin", mutated_archive, inspected, "bin"),
    "checkpoint config": Reader("made/config.json", mutated_json, inspected, "made"),
    "checkpoint weights": Reader("made/model.safetensors", mutated_header, inspected, "made"),
    "checkpoint plan": Reader("made/plan.json", mutated_json, inspected, "made"),
    "provenance": Reader("made/hisvd.json", mutated_json, inspected, "made"),
    "card": Reader("made/README.md", mutated_bytes, card_updated, "made"),
    "provenance for a card": Reader("made/hisvd.json", mutated_json, card_updated, "made"),
    "checkpoint, loaded": Reader("made/config.json", mutated_json, model_loaded, "made", True),
    "checkpoint, multiplied": Reader("made/config.json", mutated_json, multiplied, "made", True),
    "pt": Reader("made.pt", mutated_archive, inspected),
    "pt, loaded": Reader("made.pt", mutated_archive, load_pt),
    "foreign pt": Reader("foreign.pt", mutated_archive, inspected),
    "legacy pt": Reader("legacy.pt", mutated_head, inspected),
    "gguf": Reader("tiny.gguf", mutated_head, inspected, slow=True),
    "calibration": Reader("calibration/calibration.json", mutated_json, inspected, "calibration"),
    "gradients": Reader(
        "calibration/gradients/gradients.json", mutated_json, inspected, "calibration"
    ),
    "statistics": Reader(
        "calibration/block-00000.safetensors", mutated_header, statistics_read, "calibration"
    ),
    "plan": Reader("plan.json", mutated_json, inspected),
    "profile": Reader("hisvd.toml", mutated_bytes, profile_read),
    "evaluation store": Reader("store/key.json", mutated_json, store_read),
    "text": Reader("text.txt", mutated_bytes, text_read),
    "json lines": Reader("text.jsonl", mutated_lines, text_read),
    "json list": Reader("text.json", mutated_json, text_read),
    "parquet": Reader("text.parquet", mutated_bytes, text_read),
    "instructions": Reader("instructions.json", mutated_json, text_read),
}


@pytest.fixture(scope="module")
def real(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a real file, or a folder, of each kind."""
    folder = tmp_path_factory.mktemp("real")
    os.environ["HISVD_CACHE"] = str(folder / "cache")
    shutil.copytree(tiny_model("llama"), folder / "model")
    _write_models(folder)
    text = text_file(folder, 400)
    quick = ("--model", folder / "model", "--calibration", folder / "calibration")
    small = ("--dataset", text, "--samples", 2, "--seqlen", 16)
    succeed("calibrate", *quick, *small, "--gradients")
    succeed("plan", *quick, "--ratio", 0.6, "--output", folder / "plan.json")
    succeed("compress", *quick, "--ratio", 0.6, "--output", folder / "made")
    succeed("convert", folder / "made", "--to", "pt", "--output", folder / "made.pt")
    _write_texts(folder)
    return folder


def _write_models(folder: Path) -> None:
    from tests.test_gguf import write_gguf

    model = open_source(str(folder / "model"))
    loaded = load_model(folder / "model", torch.device("cpu"), torch.float32)
    loaded.save_pretrained(folder / "sharded", max_shard_size="20KB")
    shutil.copytree(folder / "model", folder / "bin")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save({n: model.weights.read(n) for n in model.weights}, folder / "bin/pytorch_model.bin")
    foreign = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    torch.save(foreign, folder / "foreign.pt")
    torch.save(foreign, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    write_gguf(folder / "model", folder / "tiny.gguf", "F32")


def _write_texts(folder: Path) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(_TEXTS)]
    (folder / "text.txt").write_text(random_text(400))
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "text.parquet")
    asked = [{"instruction": "count", "input": "to 2", "output": "1 2"}] * 3
    (folder / "instructions.json").write_text(json.dumps(asked))
    profile = '[model]\nname = "demo"\n[plan]\nratio = [0.8, 0.6]\nexclude = ["model.*"]\n'
    (folder / "hisvd.toml").write_text(profile + "[calibration]\nsamples = 4\nseed = 3\n")
    Store(folder / "store").save("key", {"windows": 2}, Sums(torch.rand(2, 3), torch.rand(2, 3)))


def _search(few: int) -> settings:
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_gives_a_result_or_an_error_of_ours(
    name: str, real: Path, tmp_path: Path
) -> None:
    reader = READERS[name]
    top = reader.file.partition("/")[0]
    copy = shutil.copytree if (real / top).is_dir() else shutil.copyfile
    copy(real / top, tmp_path / top)
    path, content = tmp_path / reader.file, (real / reader.file).read_bytes()

    @_search(FEW // 4 if reader.slow else FEW)
    @given(st.data())
    def read_mutated(data: Any) -> None:
        path.write_bytes(reader.mutate(content, data.draw))
        with suppress(HisvdError):
            reader.read(tmp_path / (reader.target or reader.file))

    read_mutated()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "mutate", "command"),
    [
        ("calibration/spectra.safetensors", mutated_header, "plan"),
        ("grid/model-0.6/hisvd.json", mutated_json, "compress"),
        ("grid/model-0.6/config.json", mutated_json, "compress"),
    ],
)
def test_a_command_that_reuses_a_mutated_file(
    file: str, mutate: Mutate, command: str, real: Path, tmp_path: Path
) -> None:
    shutil.copytree(real / "calibration", tmp_path / "calibration")
    calibration = tmp_path / "calibration"
    words: tuple[object, ...] = ("--model", real / "model", "--calibration", calibration)
    words = (*words, "--ratio", 0.5)
    if command == "compress":
        shutil.copytree(real / "made", tmp_path / "grid" / "model-0.6")
        words = (*words, "--ratio", 0.6, "--output", tmp_path / "grid", "--no-evaluate")
    path = tmp_path / file
    content = path.read_bytes()
    # Undamaged, it is reused: only the spectra of the weights, which are not cached here, are new.
    told = succeed(command, *words, "--verbose").stderr
    assert told.count("Computing spectra") == 1
    assert ("exists already" in told) == (command == "compress")

    @_search(FEW // 2)
    @given(st.data())
    def reuse_mutated(data: Any) -> None:
        path.write_bytes(mutate(content, data.draw))
        shutil.rmtree(tmp_path / "grid" / "model-0.5", ignore_errors=True)
        run(command, *words)

    reuse_mutated()
