"""``hisvd eval --report``: one page that needs nothing beside it and tells all that is known."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

from hisvd_cli.evaluation.efficiency import TimedWork, Timing, Turn
from hisvd_cli.evaluation.grid import Evaluation
from hisvd_cli.evaluation.report import page, palette
from hisvd_cli.evaluation.report.content import flat
from hisvd_cli.evaluation.report.tables import speed_table, task_rows
from hisvd_cli.evaluation.speed import BatchSpeed, Speed
from hisvd_cli.evaluation.zero_shot import Score
from tests.cli_helpers import fail, succeed, text_file
from tests.models import save_model

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements of a page, in order; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, a grid of it, a text, and the cache that both left."""
    folder = tmp_path_factory.mktemp("report")
    dense = save_model("llama", folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISVD_CACHE", str(folder / "cache"))
        text = ("--dataset", text_file(folder, seed=1), "--samples", 8, "--seqlen", 64)
        grid = ("--ratio", 0.8, "--ratio", 0.5, "--preset", "hisvd", "--preset", "svd-llm")
        succeed("compress", "--model", dense, *text, *grid, "--output", folder)
    return folder


NAMES = [f"dense-{preset}-{ratio}" for preset in ("hisvd", "svd-llm") for ratio in (0.8, 0.5)]


@pytest.fixture
def command(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """An evaluation of the grid."""
    monkeypatch.setenv("HISVD_CACHE", str(work / "cache"))
    text = ("--dataset", text_file(tmp_path, 700, seed=2), "--seqlen", 64, "--windows", 10)
    return ("eval", *(work / name for name in NAMES), *text, "--baseline", work / "dense")


def test_the_page_tells_everything_and_needs_nothing(
    command: tuple[object, ...], here: Path
) -> None:
    document = json.loads(succeed(*command, "--report", "made/page.html", "--json").stdout)
    text = (here / "made" / "page.html").read_text(encoding="utf-8")
    made = Page(text)
    # Names of SVG's namespaces are no addresses that a browser asks.
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not {"link", "img", "image", "iframe", "object"} & {tag for tag, _ in made.elements}
    assert all("src" not in attributes for _, attributes in made.elements)
    references = re.findall(r"(?:href=\"|url\()([^\")]+)", text)
    ids = Counter(a["id"] for _, a in made.elements if "id" in a)
    assert max(ids.values()) == 1
    assert {reference.removeprefix("#") for reference in references} <= set(ids)

    figures = [str(a["aria-label"]) for a in made.all("div") if a.get("role") == "img"]
    assert len(figures) == len(made.all("figure")) == len(made.all("svg")) == 4 + 4 + 7
    for name in NAMES:
        assert any(f"Share kept in {name}," in label for label in figures)
        assert name in made.text
    for figure, against in product(("Perplexity", "KL"), ("share kept", "size")):
        assert any(label.startswith(f"{figure} against {against}. hisvd: ") for label in figures)
    assert sum(label.startswith("Whitened spectra of ") for label in figures) == 7
    for each in document["evaluations"]:
        low, high = each["results"][0]["intervals"]["kl"]
        assert f"{each['results'][0]['kl']:.4f} {low:.4f} to {high:.4f}" in made.text
    assert "settings.plan.alpha" in made.text
    assert "versions.torch" in made.text


def test_the_page_can_be_used_by_all(command: tuple[object, ...], here: Path) -> None:
    succeed(*command, "--report", "page.html")
    text = (here / "page.html").read_text(encoding="utf-8")
    made = Page(text)
    assert made.all("html") == [{"lang": "en"}]
    assert {"scope"} <= set.intersection(*(set(head) for head in made.all("th")))
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert viewport in made.all("meta")
    sortable = [table for table in made.all("table") if table.get("class") == "sortable"]
    assert len(sortable) == 4  # results, pairs, sublayers, times
    assert 'querySelectorAll("table.sortable")' in text
    assert "model.layers.2.mlp.down_proj" in made.text
    made_in = re.search(r"calibrate plan decompose write total (.*) Settings", made.text)
    assert made_in
    seconds = [float(word) for word in made_in[1].split() if word not in NAMES]
    assert len(seconds) == 4 * 5
    for *stages, total in zip(*[iter(seconds)] * 5, strict=True):
        assert sum(stages) == pytest.approx(total, abs=0.3)  # each is rounded to a tenth
    succeed(*command, "--report", "again.html")
    assert (here / "again.html").read_text(encoding="utf-8") == text


def test_without_a_cache_or_plans_the_page_says_what_is_left_out(
    work: Path, here: Path, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = here / "a <b> & 'c' $x$"
    shutil.copytree(work / NAMES[0], odd)
    (odd / "plan.json").unlink()
    monkeypatch.setenv("HISVD_CACHE", str(here / "empty"))
    succeed("eval", odd, *command[5:-2], "--report", "page.html")
    text = (here / "page.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    made = Page(text)
    assert "a <b> & 'c' $x$" in made.text
    assert "None of these models has a plan" in made.text
    assert "Not available: neither a calibration nor spectra" in made.text
    assert "Not available: none of these models was compressed on this machine" in made.text


def test_what_stops_a_report_stops_it_before_the_work(
    command: tuple[object, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, hint = fail(*command, "--report", here)
    assert (message, hint) == (f"--report {here} is a folder.", "Give the path of a file.")
    (here / "file").touch()
    assert "Cannot write --report" in fail(*command, "--report", here / "file" / "p.html")[0]
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "matplotlib" else name)
    message, hint = fail(*command, "--report", "page.html", code=2)
    assert message == "--report requires the package 'matplotlib'."
    assert "hisvd[report]" in hint
    assert [path.name for path in here.iterdir()] == ["file"]


def test_colours_stand_out() -> None:
    """WCAG 2 AA: 4.5 for text, 3 for lines and marks."""
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    for ink in (palette.TEXT, palette.MUTED, palette.LINK):
        for ground in (palette.BACKGROUND, palette.PANEL):
            assert palette.contrast(ink, ground) >= 4.5
    for colour in (*palette.SERIES, palette.LINE):
        assert palette.contrast(colour, palette.BACKGROUND) >= 3
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    for step in range(20):
        cell = to_hex(colormaps["viridis"].resampled(20)(step))
        assert palette.contrast(palette.ink_on(cell), cell) >= 4.5


def test_leaves_of_json_stand_behind_their_paths() -> None:
    assert flat({"x": [{"a": 1, "b": {"c": 2}}]}) == [("x.0.a", 1), ("x.0.b.c", 2)]
    assert flat({"speed": 3.5, "sizes": [1, 8]}) == [("speed", 3.5), ("sizes", [1, 8])]
    assert flat({"a": {}}) == [("a", {})]


def _score(task: str, value: float | None, filtered: str = "none") -> Score:
    return Score(task, "acc", filtered, value, 0.01, True, 0, 100, "1")


def test_scores_of_a_task_stand_side_by_side() -> None:
    rows = task_rows(
        [
            Evaluation("dense", [], scores=[_score("arc", 0.5), _score("piqa", 0.7)]),
            Evaluation("small", [], scores=[_score("arc", None), _score("arc", 0.25, "strict")]),
            Evaluation("other", []),
        ]
    )
    shown = {
        (row["task"], row["metric"]): [(cell.text, cell.bounds) for cell in row["scores"]]
        for row in rows
    }
    nothing = ("–", "")
    assert shown == {
        ("arc", "acc"): [("0.5000", "± 0.0100"), ("not finite", ""), nothing],
        ("piqa", "acc"): [("0.7000", "± 0.0100"), nothing, nothing],
        ("arc", "acc (strict)"): [nothing, ("0.2500", "± 0.0100"), nothing],
    }


def _timing(prefill: float, step: float) -> Timing:
    """Three turns of 100 tokens of prompt and 4 new ones."""
    return Timing((Turn(prefill, (step,) * 4, 100, 4),) * 3, 3_000_000)


def _speed(*speeds: BatchSpeed) -> Speed:
    return Speed("cpu", "bfloat16", 2, False, TimedWork(1, 100, 4, 3), 10, 20, speeds)


def test_speeds_of_all_models_are_one_table() -> None:
    own, slow = _timing(0.05, 0.002), _timing(0.1, 0.001)
    made = speed_table(
        [
            Evaluation("dense", []),
            Evaluation(
                "small", [], speed=_speed(BatchSpeed(1, own, slow), BatchSpeed(8, own, own))
            ),
            Evaluation("alone", [], speed=_speed(BatchSpeed(1, slow, None))),
        ]
    )
    assert made
    assert made.conditions == [
        "100 prompt tokens, 4 new tokens, 3 repetitions; bfloat16 on cpu, 2 threads"
    ]
    found = {
        (model, batch, phase): dict(zip(made.columns, figures, strict=True))
        for model, batch, phase, figures in made.rows
    }
    assert len(found) == 2 * 2 + 2
    prefill, decode = (found["small", 1, phase] for phase in ("prefill", "decode"))
    assert [prefill[name].value for name in ("tokens/s", "baseline", "speed", "p50 ms")] == (
        pytest.approx([2000, 1000, 2, 50])
    )
    assert (prefill["speed"].bounds, decode["speed"].bounds) == ("faster", "slower")
    assert [decode[name].value for name in ("tokens/s", "speed", "p99 ms", "peak MB")] == (
        pytest.approx([500, 0.5, 2, 3])
    )
    assert found["alone", 1, "prefill"]["baseline"].text == "–"
    assert made.slow == [
        ("small", ["decode at batch 1", "prefill at batch 8", "decode at batch 8"])
    ]
    assert speed_table([Evaluation("dense", [])]) is None


def test_the_page_shows_speeds(command: tuple[object, ...], here: Path) -> None:
    short = ("--prompt-tokens", 12, "--new-tokens", 3, "--turns", 2)
    timed = ("--efficiency", "--batch-sizes", "1,2", *short, "--report", "page.html", "--json")
    document = json.loads(succeed(*command, *timed).stdout)
    text = Page((here / "page.html").read_text(encoding="utf-8")).text
    assert "Zero-shot" not in text
    shown = text.split("peak MB ", 1)[1].split(" Not faster than", 1)[0]
    for each in document["evaluations"]:
        for at_batch in each["efficiency"]["batches"]:
            for phase in ("prefill", "decode"):
                speedup = at_batch["versus_baseline"][phase]["speedup"]
                verdict = at_batch["versus_baseline"][phase]["verdict"]
                row = (
                    rf"{Path(each['model']).name} {at_batch['batch']} {phase} \S+ \S+ (\S+) × (\w+)"
                )
                cells = re.search(row, shown)
                assert cells
                assert cells.groups() == (f"{speedup:.2f}", verdict)
