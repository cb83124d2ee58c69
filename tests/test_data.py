"""Texts by name, and the windows that are drawn from them."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from hisvd_cli.calibration.text.datasets import NAMED, HubSet, Purpose, Text, load_text
from hisvd_cli.calibration.text.tokens import (
    check_seqlen,
    model_positions,
    sample_windows,
    tokenize,
)
from hisvd_cli.modeling.sources.opening import open_source
from hisvd_cli.utils.errors import DataError
from tests.conftest import MakeModel
from tests.models import BOS, edit_json, names, random_text

TEXTS = ["first", "", " = Title = \n", "größer\u2028same text", "last"]
JOINED = "\n\n".join(TEXTS)


def json_lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text(json_lines(rows), encoding="utf-8")
    return path


# Files


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(JOINED.encode())
    text = load_text(str(path), "calibration")
    assert (text.name, text.split, text.content) == (str(path), "file", JOINED)
    assert text.digest == load_text(str(path), "evaluation").digest
    assert text.digest == hashlib.sha256(f"{len(JOINED.encode())}:{JOINED}".encode()).hexdigest()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["text", "sentence", "content", "document"])
def test_rows_are_joined_by_blank_lines(suffix: str, column: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": i, column: t} for i, t in enumerate(TEXTS)]
    rows.insert(2, {"id": 9, column: None})  # a row without text is left out
    path = write_rows(tmp_path / f"x{suffix}", rows)
    assert load_text(str(path), "calibration").content == JOINED


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + json_lines([{"text": t} for t in TEXTS]), encoding="utf-8")
    assert load_text(str(path), "calibration").content == JOINED


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_reading_a_file_leaves_nothing_in_the_cache_of_datasets(
    suffix: str, tmp_path: Path
) -> None:
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = sorted(cache.rglob("*"))
    load_text(str(write_rows(tmp_path / f"x{suffix}", [{"text": "a"}])), "calibration")
    assert sorted(cache.rglob("*")) == before
    assert len(names(tmp_path)) == 1


def test_a_file_wins_over_a_named_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wikitext2").write_text("mine")
    assert load_text("wikitext2", "calibration").content == "mine"


def test_demo_texts_do_not_overlap() -> None:
    known = set(load_text("demo", "calibration").content.splitlines())
    lines = [line for line in load_text("demo", "evaluation").content.splitlines() if line]
    assert len(lines) > 300
    assert sum(line in known for line in lines) <= 0.01 * len(lines)  # the text repeats itself


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("x.txt", None, "There is no file '.*x.txt'", ".txt, .jsonl, .json, .parquet"),
        ("x.jsonl", None, "There is no file", ".parquet"),
        ("x.txt", b"", "contains no text", "another file"),
        ("x.txt", b" \n\t\n", "contains no text", "another file"),
        ("x.txt", b"\xff\xfe\x00", "is not UTF-8 text", "UTF-8"),
        ("x.jsonl", b"", "contains no text", "another file"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text"\n',
            "is not valid JSON in line 2",
            "one object per line",
        ),
        (
            "x.json",
            b'[\n{"text": "a"},\n]',
            "is not valid JSON in line 2|is not valid JSON in line 3",
            "list",
        ),
        ("x.jsonl", b'{"a": 1, "b": 2}', "has no text column; it has a, b", "Name the text column"),
        ("x.jsonl", b'{"messages": "a"}', "Row 1 of '.*x.jsonl' contains no conv", "messages with"),
        ("x.jsonl", b'{"conversations": 3}', "Row 1 of '.*x.jsonl' contains", "messages with"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n{}', "Row 2 of", "message"),
        ("x.jsonl", b"[1]", "Row 1 of '.*x.jsonl' has no text column", "Name the text column"),
        ("x.jsonl", b"[1]", "has no text column; it has none", "Name the text column"),
        ("x.jsonl", b'{"text": null}', "contains no text", "another file"),
        ("x.parquet", b"PAR1 and nothing else", "is not a readable Parquet file", "again"),
        ("x.parquet", b"", "is not a readable Parquet file", "again"),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: bytes | None, message: str, hint: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text(str(tmp_path / name), "calibration")
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_a_folder_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no file 'a/b', only a folder"):
        load_text("a/b", "calibration")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("a")

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"Cannot read .*x\.txt: Permission denied"):
        load_text(str(tmp_path / "x.txt"), "calibration")


def test_unknown_names_are_corrected() -> None:
    with pytest.raises(DataError, match="No dataset 'wikitext'") as caught:
        load_text("wikitext", "calibration")
    assert caught.value.hint == "Did you mean 'wikitext2'?"


# The hub, played by folders on disk


def test_c4_is_read_as_a_stream_up_to_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = NAMED["c4"]
    assert hub.files is not None
    for purpose, file in hub.files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with gzip.open(tmp_path / file, "wt") as target:
            target.write(json_lines([{"url": "u", "text": f"{purpose} {i}"} for i in range(9)]))
    monkeypatch.setitem(NAMED, "c4", replace(hub, repo=str(tmp_path), limit=3))
    text = load_text("c4", "calibration")
    assert (text.split, text.content) == (
        "train",
        "calibration 0\n\ncalibration 1\n\ncalibration 2",
    )
    text = load_text("c4", "evaluation")
    assert (text.split, text.content[:12]) == ("validation", "evaluation 0")


def test_ptb_is_read_from_the_branch_that_needs_no_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as that branch of the hub is; datasets refuses a repository with a script."""
    for split in ("train", "validation", "test"):
        folder = tmp_path / "repository" / "penn_treebank" / split
        folder.mkdir(parents=True)
        write_rows(folder / "0000.parquet", [{"sentence": f"{split} {i}"} for i in range(2)])
    real = datasets.load_dataset

    def local(repo: str, config: str | None, revision: str, **kwargs: Any) -> Any:
        assert (repo, config) == ("ptb-text-only/ptb_text_only", None)
        assert revision == "refs/convert/parquet"
        return real(str(tmp_path / "repository"), config, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", local)
    text = load_text("ptb", "calibration")
    assert (text.split, text.content) == ("train", "train 0\n\ntrain 1")
    assert load_text("ptb", "evaluation").content == "test 0\n\ntest 1"


@pytest.mark.parametrize(
    ("name", "purpose", "expected"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("org/set", "calibration", ("org/set", None, "train")),
        ("org/set:en", "evaluation", ("org/set", "en", "test")),
    ],
)
def test_what_is_asked_of_the_hub(
    name: str,
    purpose: Purpose,
    expected: tuple[str, str | None, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(repo: str, config: str | None, split: str, **_: Any) -> datasets.Dataset:
        assert (repo, config, split) == expected
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = load_text(name, purpose)
    assert (text.name, text.split, text.content) == (name, expected[2], JOINED)


def test_without_a_network() -> None:
    with pytest.raises(DataError, match="Cannot download 'org/never-fetched'") as caught:
        load_text("org/never-fetched", "calibration")
    assert "\n" not in caught.value.message
    assert "local" in caught.value.hint


def test_splits_of_a_named_set_differ() -> None:
    for hub in NAMED.values():
        assert isinstance(hub, HubSet)
        assert hub.splits["calibration"] != hub.splits["evaluation"]


# Tokens


def test_the_text_is_tokenized_once_as_a_whole(tiny_model: MakeModel) -> None:
    source = open_source(str(tiny_model("llama")))
    content = random_text(500)
    tokens = tokenize(Text("x", "file", content), source)
    assert tokens.dtype == torch.long
    assert source.tokenizer.decode(tokens.tolist()) == content  # longer than the model's window


def test_special_tokens_are_the_tokenizers_own(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    edit_json(folder / "tokenizer.json", post_processor=template)
    text = Text("x", "file", random_text(50))
    tokens = tokenize(text, open_source(str(folder)))
    assert tokens[0] == BOS
    assert torch.equal(tokens[1:], tokenize(text, open_source(str(tiny_model("llama")))))


def windows_of(tokens: Tensor, windows: Tensor) -> list[int]:
    """Return at which window of the text each drawn one stands."""
    seqlen = windows.shape[1]
    starts = [int(window[0]) for window in windows]  # every token is its own position
    for start, window in zip(starts, windows, strict=True):
        assert torch.equal(window, tokens[start : start + seqlen])
        assert start % seqlen == 0
    return [start // seqlen for start in starts]


def test_windows_are_drawn_without_overlap() -> None:
    tokens = torch.arange(1003)
    drawn = windows_of(tokens, sample_windows(tokens, 30, 10, 0, "x"))
    assert len(set(drawn)) == 30
    assert drawn != sorted(drawn)
    assert drawn == windows_of(tokens, sample_windows(tokens, 30, 10, 0, "x"))
    assert drawn != windows_of(tokens, sample_windows(tokens, 30, 10, 1, "x"))
    assert drawn[:7] == windows_of(tokens, sample_windows(tokens, 7, 10, 0, "x"))


def test_the_draw_depends_on_no_other_random_state() -> None:
    tokens = torch.arange(1000)
    torch.manual_seed(1)
    first = sample_windows(tokens, 5, 10, 0, "x")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(sample_windows(tokens, 5, 10, 0, "x"), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_short_text_gives_all_its_windows() -> None:
    tokens = torch.arange(39)
    assert sorted(windows_of(tokens, sample_windows(tokens, 256, 10, 0, "x"))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "hint"), [(9, "Lower `calibration.seqlen` to 9"), (1, "Give a longer text")]
)
def test_too_few_tokens(count: int, hint: str) -> None:
    expected = f"'x' has {count} tokens, fewer than one window of 10"
    with pytest.raises(DataError, match=expected) as caught:
        sample_windows(torch.arange(count), 4, 10, 0, "x")
    assert hint in caught.value.hint


def test_windows_longer_than_the_models_positions(tiny_model: MakeModel) -> None:
    source = open_source(str(tiny_model("llama")))
    assert model_positions(source) == 128
    check_seqlen(128, source)
    with pytest.raises(
        DataError, match=r"`calibration\.seqlen` 129 exceeds the maximum length"
    ) as caught:
        check_seqlen(129, source)
    assert caught.value.hint == "Set `calibration.seqlen` to 128 or less."
