"""Conversations as text for calibration and evaluation, and packed or misnamed files of rows."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hisvd_cli.calibration.text.chats import rendered
from hisvd_cli.calibration.text.datasets import load_text, without
from hisvd_cli.calibration.text.tokens import token_ends, tokenize
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.modeling.sources.source import Source
from hisvd_cli.utils.errors import DataError
from tests.cli_helpers import as_json, fail
from tests.models import edit_json, random_text, save_model

_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant', 'system') %}{{ raise_exception('role') }}{% endif %}"
    "{{ '<s>' }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
_CHAT = [
    {"role": "user", "content": "what was in the beginning"},
    {"role": "assistant", "content": "a small model"},
]


def _split(text: str) -> list[str]:
    return [text[:5], text[5:]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = save_model("llama", tmp_path_factory.mktemp("chat") / "model")
    edit_json(folder / "tokenizer_config.json", chat_template=_TEMPLATE)
    return open_source(str(folder))


def rows(path: Path, *documents: object) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    return str(path)


SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": _CHAT},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": _CHAT[0]["content"]},
            {"from": "gpt", "value": _CHAT[1]["content"]},
        ]
    },
    "texts": {"prompt": _CHAT[0]["content"], "completion": _CHAT[1]["content"]},
    "sides": {"prompt": _CHAT[:1], "completion": _CHAT[1:]},
    "parts": {
        "messages": [
            {
                **turn,
                "content": [{"type": "text", "text": word} for word in _split(turn["content"])],
            }
            for turn in _CHAT
        ]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_read_as_the_chat_template_writes_them(
    shape: str, source: Source, tmp_path: Path
) -> None:
    name = rows(tmp_path / "chat.jsonl", SHAPES[shape], {"messages": _CHAT[:1]})
    text = load_text(name, "calibration")
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    expected = [
        token
        for chat in (_CHAT, _CHAT[:1])
        for token in tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ]
    assert tokenize(text, source).tolist() == expected
    ids, ends = token_ends(text, source)
    assert ids.tolist() == expected
    chats = (_CHAT, _CHAT[:1])
    whole = "".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)
    assert ends is not None
    assert int(ends[-1]) == len(whole.encode())


def test_conversations_in_parquet(source: Source, tmp_path: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    path = tmp_path / "chat.parquet"
    table = pyarrow.Table.from_pylist([{"messages": _CHAT}, {"messages": [{**_CHAT[0], "x": "y"}]}])
    parquet.write_table(table, path)
    text = load_text(str(path), "calibration")
    lines = rows(tmp_path / "c.jsonl", {"messages": _CHAT}, {"messages": [{**_CHAT[0], "x": "y"}]})
    assert torch.equal(tokenize(text, source), tokenize(load_text(lines, "calibration"), source))


def test_what_is_dropped_goes_from_every_message(tmp_path: Path) -> None:
    text = load_text(rows(tmp_path / "c.jsonl", {"messages": _CHAT}), "calibration")
    shorter = without(text, "small")
    assert shorter.chats[0][1]["content"] == "a model"
    assert shorter.digest != text.digest


def test_a_chat_is_calibrated_and_evaluated_on(source: Source, tmp_path: Path) -> None:
    many = [{"messages": [{"role": "user", "content": random_text(30, i)}]} for i in range(40)]
    name, other = rows(tmp_path / "chat.jsonl", *many), rows(tmp_path / "other.jsonl", *many[:20])
    words = ("--model", source.folder, "--dataset", name, "--samples", 4, "--seqlen", 32)
    output = tmp_path / "made"
    made = as_json("compress", *words, "--ratio", 0.6, "--output", output)
    assert made["kept_parameters"]
    record = json.loads((output / "hisvd.json").read_text())["calibration"]["data"]
    assert record["text_sha256"] == load_text(name, "calibration").digest
    result = as_json("eval", output, "--dataset", other, "--seqlen", 32)["results"][0]
    tokens = len(tokenize(load_text(other, "evaluation"), source))
    assert result["windows"] == tokens // 32
    assert result["bits_per_byte"] > 0


def test_a_template_that_asks_for_the_day_writes_the_same_text_on_every_day(
    tmp_path: Path,
) -> None:
    folder = save_model("llama", tmp_path / "dated")
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    edit_json(folder / "tokenizer_config.json", chat_template=dated)
    text = rendered([[{"role": "user", "content": "w1"}]], "chats", Source("dated", folder))
    assert text == "26 Jul 2024w1"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    name = rows(tmp_path / "chat.jsonl", {"messages": _CHAT})
    message, hint = fail("calibrate", "--model", folder, "--dataset", name, "--seqlen", 8)
    assert "no chat template" in message
    assert "text column" in hint


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [{"role": "martian", "content": "x"}]}, "row 2"),
        ({"messages": []}, "Row 2"),
        ({"messages": ["x"]}, "Row 2"),
        ({"messages": [{"role": 1, "content": "x"}]}, "Row 2"),
        ({"text": "x"}, "Row 2"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(
    row: object, told: str, source: Source, tmp_path: Path
) -> None:
    name = rows(tmp_path / "chat.jsonl", {"messages": _CHAT}, row)
    with pytest.raises(DataError, match=told):
        tokenize(load_text(name, "calibration"), source)


def test_a_template_runs_nothing(tmp_path: Path) -> None:
    """The sandbox refuses what reaches Python's own objects."""
    folder = save_model("llama", tmp_path / "model")
    lure = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    edit_json(folder / "tokenizer_config.json", chat_template=lure)
    text = load_text(rows(tmp_path / "c.jsonl", {"messages": _CHAT}), "calibration")
    with pytest.raises(DataError, match="chat template"):
        tokenize(text, open_source(str(folder)))


def _gzipped(content: str) -> bytes:
    return gzip.compress(content.encode())


def _bzipped(content: str) -> bytes:
    return bz2.compress(content.encode())


def _zstandard(content: str) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content.encode(), "zstd", asbytes=True))


def _plain(content: str) -> bytes:
    return content.encode()


_LINES = '{"text": "a b"}\n{"text": "c"}\n'
_LIST = '[{"text": "a b"}, {"text": "c"}]'
_OBJECT = '{\n "version": 1,\n "data": [{"text": "a b"}, {"text": "c"}]\n}'


@pytest.mark.parametrize(
    ("name", "write", "content"),
    [
        ("c4.json.gz", _gzipped, _LINES),
        ("c4.jsonl.gz", _gzipped, _LINES),
        ("list.json.gz", _gzipped, _LIST),
        ("pile.jsonl.bz2", _bzipped, _LINES),
        ("pile.jsonl.zst", _zstandard, _LINES),
        ("lines.json", _plain, _LINES),
        ("list.jsonl", _plain, _LIST),
        ("object.json", _plain, _OBJECT),
    ],
)
def test_rows_are_read_whatever_the_name_says(
    name: str, write: Callable[[str], bytes], content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(write(content))
    assert load_text(str(tmp_path / name), "calibration").content == "a b\n\nc"


def test_a_packed_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(_gzipped("\ufeffa\r\nb"))
    assert load_text(str(tmp_path / "t.txt.gz"), "calibration").content == "a\nb"


PACKERS = {".gz": _gzipped, ".bz2": _bzipped, ".zst": _zstandard}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["not packed", "cut short", "no JSON"])
def test_a_damaged_packed_file(suffix: str, damage: str, tmp_path: Path) -> None:
    pack = PACKERS[suffix]
    data = {"not packed": b"no archive", "cut short": pack("x" * 99)[:-6], "no JSON": pack("{")}
    path = tmp_path / f"t.json{suffix}"
    path.write_bytes(data[damage])
    with pytest.raises(DataError, match=re.escape(path.name)):
        load_text(str(path), "calibration")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_that_unpacks_without_end_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hisvd_cli.calibration.text.files._UNPACKED_BASE", 1000)
    (tmp_path / f"t.txt{suffix}").write_bytes(PACKERS[suffix]("x" * 10**6))
    with pytest.raises(DataError, match="decompresses to more than"):
        load_text(str(tmp_path / f"t.txt{suffix}"), "calibration")


def test_a_packed_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file") as caught:
        load_text(str(tmp_path / "x.json.gz"), "calibration")
    assert ".gz" in caught.value.hint
