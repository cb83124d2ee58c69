"""Small files that declare, or unpack to, far more than they hold: an error, and little memory."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from pyarrow import parquet

from tests.cli_helpers import environment, two_lines
from tests.conftest import MakeModel
from tests.models import edit_json

LIMIT = 1_000_000_000
"""Bytes of memory of its own that a process may take, three times what its libraries need."""
HUGE = 1 << 60

# Runs each command of a list in turn, under the limit, and prints what each said.
_DRIVER = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from tests.cli_helpers import hisvd
for words in json.loads(sys.argv[2]):
    result = hisvd(*words)
    print(json.dumps([result.exit_code, result.stderr]), flush=True)
"""


def bounded(*commands: tuple[object, ...]) -> list[str]:
    """Run commands in one process of little memory; return the message of each error."""
    asked = json.dumps([[str(word) for word in words] for words in commands])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(LIMIT), asked],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(commands), done.stderr
    assert {code for code, _ in told} == {1}, told
    return [two_lines(stderr)[0] for _, stderr in told]


def gguf(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


GGUFS = {
    "fields": gguf(0, HUGE),
    "tensors": gguf(HUGE, 0),
    "values": gguf(0, 1, gguf_text("a") + struct.pack("<IIQ", 9, 0, HUGE)),
    "lists": gguf(0, 1, gguf_text("a") + struct.pack("<IIQ", 9, 9, HUGE)),
    "text": gguf(0, 1, gguf_text("a") + struct.pack("<IQ", 8, HUGE)),
    "nested": gguf(0, 1, gguf_text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20),
    "numbers": gguf(1, 0, gguf_text("a") + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
    "kind": gguf(1, 0, gguf_text("a") + struct.pack("<IQIQ", 1, 1, 999, 0)),
}


def test_a_gguf_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.gguf" for name in GGUFS]
    for path, content in zip(paths, GGUFS.values(), strict=True):
        path.write_bytes(content)
    for path, message in zip(paths, bounded(*(("inspect", path) for path in paths)), strict=True):
        assert message.startswith(f"{path} is not a complete GGUF file: ")


def deflated(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
    return path


def nested_modules(depth: int) -> bytes:
    """Return a pickle of modules that hold the next one twice: two to the ``depth`` in all."""
    names = ["a" * 250, "b" * 250]

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def module(inner: bytes) -> bytes:
        held = b"}(" + b"".join(text(name) + inner for name in names) + b"u"
        state = b"}(" + text("_parameters") + b"}" + text("_modules") + held + b"u"
        return b"cx\nM\n)R" + state + b"b"

    memo = module(b"N") + struct.pack("<Bi", ord("r"), 0) + b"0"
    for level in range(1, depth):
        memo += module(struct.pack("<Bi", ord("j"), level - 1))
        memo += struct.pack("<Bi", ord("r"), level) + b"0"
    return b"\x80\x02" + memo + struct.pack("<Bi", ord("j"), depth - 1) + b"."


@pytest.mark.slow
def test_a_pickle_that_inflates(tmp_path: Path) -> None:
    giant = b"\x80\x04\x8e" + struct.pack("<Q", 300_000_000) + bytes(300_000_000) + b"."
    paths = [
        deflated(tmp_path / "bytes.pt", giant),
        deflated(tmp_path / "dicts.pt", b"\x80\x02" + b"}" * 9_000_000 + b"."),
        deflated(tmp_path / "modules.pt", nested_modules(40)),
    ]
    del giant
    assert max(path.stat().st_size for path in paths) < 1_000_000
    unpacks, instructions, objects = bounded(*(("inspect", path) for path in paths))
    assert "unpacks to" in unpacks
    assert "instructions" in instructions
    assert "objects" in objects


def expanded(model: Path) -> None:
    (model / "model.safetensors").unlink()
    weight = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({"model.embed_tokens.weight": weight}, model / "pytorch_model.bin")


def inflated(model: Path) -> None:
    (model / "model.safetensors").unlink()
    content = b"\x80\x04\x8e" + struct.pack("<Q", 300_000_000) + bytes(300_000_000) + b"."
    deflated(model / "pytorch_model.bin", content)


def layers(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=10**9)


def wide(model: Path) -> None:
    edit_json(model / "config.json", head_dim=10**12)


def sparse_config(model: Path) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(4_000_000_000)


def header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", HUGE) + b"{}")


def test_a_model_that_declares_more_than_it_holds(tiny_model: MakeModel, tmp_path: Path) -> None:
    damages = {
        expanded: "more values than its storage",
        inflated: "unpacks to",
        layers: "num_hidden_layers",
        wide: "head_dim",
        sparse_config: "config.json",
        header: "model.safetensors",
    }
    folders = [tmp_path / damage.__name__ for damage in damages]
    for damage, folder in zip(damages, folders, strict=True):
        damage(Path(shutil.copytree(tiny_model("llama"), folder)))
    messages = bounded(*(("inspect", folder) for folder in folders))
    for message, told in zip(messages, damages.values(), strict=True):
        assert told in message


@pytest.mark.slow
def test_a_parquet_file_that_inflates(tiny_model: MakeModel, tmp_path: Path) -> None:
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000), ["word " * 200_000])
    for name, typed in (("typed", True), ("plain", False)):
        table, path = pa.table({"text": rows}), tmp_path / f"{name}.parquet"
        parquet.write_table(table, path, compression="zstd", store_schema=typed)
        assert path.stat().st_size < 1_000_000
    words = ("calibrate", "--model", tiny_model("llama"), "--dataset")
    for message in bounded(
        *((*words, tmp_path / f"{name}.parquet") for name in ("typed", "plain"))
    ):
        assert "decompresses to more than" in message
