"""Names from files reach no terminal, Markdown or spreadsheet with a meaning of their own."""

from __future__ import annotations

import csv
import json
import logging
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt  # comes with rich
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from hisvd_cli.cli.console import Console
from hisvd_cli.cli.libraries import calm_libraries
from hisvd_cli.export.card_results import CardResult, update_card
from hisvd_cli.utils.errors import HisvdError
from hisvd_cli.utils.escaping import markdown_code, markdown_text, printable, spreadsheet_cell
from tests.cli_helpers import SCRIPT, environment, fail, hisvd, script, succeed
from tests.conftest import MakeModel
from tests.models import edit_json
from tests.test_source import copy_of

CLEAR, TITLE, LINK = "\x1b[2J\x1b[H", "\x1b]0;owned\x07", "\x1b]8;;http://evil\x1b\\here"
C1, BIDI, CONTROL = "\x9b2J\x9d0;owned\x9c\x85", "\u202egpj\u2066\u200f", "\r\x08\x00\x7f"
HOSTILE = f"[red]w[/]:smile:{CLEAR}{TITLE}{LINK}{C1}{BIDI}{CONTROL}"
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
SHOWN = "[red]w[/]:smile:"


def harmless(text: str) -> str:
    """Return what was printed; fail where it holds a control sequence that is not a colour."""
    assert not FORBIDDEN.search(re.sub(r"\x1b\[[\d;]*m", "", text)), repr(text)
    return text


# A terminal


@pytest.fixture
def hostile(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A model with hostile names of tensors."""
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{HOSTILE}.{i}\nError: forged\n": torch.full((2, 2), torch.nan) for i in range(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("flags", [[], ["--verbose"], ["--quiet"], ["--json"]])
def test_names_of_tensors_do_not_steer_the_terminal(hostile: Path, flags: list[str]) -> None:
    done = script("inspect", hostile, *flags, cwd=hostile)
    assert done.returncode == 1
    shown = harmless(done.stdout) + harmless(done.stderr)
    assert not any(line.startswith("Error: forged") for line in shown.splitlines())
    if not flags:
        assert SHOWN in shown
    if "--json" in flags:  # there the name is exact
        assert any(f"{HOSTILE}.0\n" in problem for problem in json.loads(done.stdout)["problems"])


def test_a_pickle_of_hostile_names_does_not_steer_the_terminal(here: Path) -> None:
    state = {f"model.layers.0.{HOSTILE}.weight": torch.zeros(4, 4), HOSTILE: torch.zeros(2)}
    torch.save(state, here / "x.pt")
    done = script("inspect", "x.pt", "--verbose", cwd=here)
    shown = harmless(done.stdout) + harmless(done.stderr)
    assert SHOWN in shown


@pytest.mark.parametrize("command", ["inspect", "eval", "convert"])
def test_a_hostile_path_does_not_steer_the_terminal(here: Path, command: str) -> None:
    name = HOSTILE.replace("\x00", "").replace("/", "")
    (here / name).mkdir()
    words = ["--to", "pt", "--output", "x.pt"] if command == "convert" else []
    done = script(command, name, *words, cwd=here)
    assert done.returncode != 0
    assert "[red]w" in harmless(done.stderr)
    assert done.stdout == ""


def test_a_hostile_config_and_provenance_do_not_steer_the_terminal(
    tiny_model: MakeModel, here: Path
) -> None:
    quick = ("--samples", 8, "--seqlen", 64, "--dataset", "demo", "--ratio", 0.6)
    made = ("compress", "--model", tiny_model("llama"), *quick, "--output", "low")
    succeed(*made, "--set", "compress.evaluate=false")
    record = json.loads((here / "low" / "hisvd.json").read_text())
    record["model"]["name"] = record["decomposer"] = record["allocator"] = HOSTILE
    (here / "low" / "hisvd.json").write_text(json.dumps(record))
    assert SHOWN in harmless(script("inspect", "low", cwd=here).stdout)
    edit_json(here / "low" / "config.json", model_type=HOSTILE, auto_map={})
    done = script("inspect", "low", cwd=here, env={"HISVD_DEBUG": "1"})  # the traceback as well
    assert "Traceback" in done.stderr
    assert "[red]w" in harmless(done.stderr)


@pytest.mark.slow
def test_a_real_terminal_gets_colours_and_no_other_sequence(hostile: Path) -> None:
    master, slave = pty.openpty()
    done = subprocess.Popen(
        [SCRIPT, "inspect", str(hostile), "--no-check-values"],
        cwd=hostile,
        env=environment({"TERM": "xterm", "COLUMNS": "100"}),
        stdout=slave,
        stderr=subprocess.DEVNULL,
    )
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 1 << 16):
            shown += data
    except OSError:  # Linux: the other end is closed
        pass
    done.wait(60)
    os.close(master)
    text = shown.decode().replace("\r\n", "\n")
    assert "\x1b[1m" in text
    assert "architecture" in harmless(text)


def test_no_line_is_forged_by_a_line_break(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(verbose=True)
    forged = "x\nNext: rm -rf ~\u2028Next: y\x0bz"
    for tell in (console.note, console.warn, console.suggest, console.next_command):
        tell(forged)
    console.error(HisvdError(forged, forged))
    table = Table("a", "b")
    table.add_row(forged, Text(forged, style="bold"))
    console.show(table)
    console.show(Text(forged))
    console.show(forged)
    out, err = capsys.readouterr()
    for line in harmless(out + err).splitlines():
        assert not line.startswith("Next: rm")
    assert len(err.splitlines()) == 4 + len(forged.splitlines()) + 1


def test_progress_shows_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().stage(f"Asking {HOSTILE}", 1) as step:
        step()
    assert "Asking [red]w" in harmless(capsys.readouterr().err)
    console = Console()
    progress = Progress(TextColumn("{task.description}", markup=False), console=console._err)
    progress.add_task(HOSTILE, total=1)
    with console._err.capture() as captured:
        console._err.print(progress.get_renderable())
    assert "[red]w" in harmless(captured.get())


def test_logs_of_libraries_show_no_control_characters(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler()])
    before = logger.level
    calm_libraries(quiet=True, verbose=True)
    try:
        logger.error("Missing: %s", HOSTILE)
    finally:
        logger.setLevel(before)
    assert "Missing: [red]w" in harmless(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 👩‍💻 क्‍ष\tq\n", "plain é 漢 👩‍💻 क्‍ष\tq\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b\x1b[0m[31mnested", "[31mnested"),
        (TITLE, "]0;owned"),
        (C1, "2J0;owned"),
        (BIDI, "gpj"),
        (CONTROL, ""),
        ("a\u00adb\u200bc\ufeffd\U000e0041e", "abcde"),
    ],
)
def test_what_a_terminal_is_given(text: str, shown: str) -> None:
    assert printable(text) == shown


# Markdown


NAMES = [
    "a|b",
    "**bold** _em_ `code`",
    "<img src=x onerror=alert(1)>",
    "[link](http://evil)",
    "![x](y)",
    "a\n\n# heading",
    "<!-- hisvd: end of results -->",
    "back\\slash &lt; ~~x~~ $x$",
    "``ticks``",
    "snake_case_name",
    HOSTILE.replace("\x85", ""),
]


def rendered(text: str) -> str:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return str(reader.render(text))


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_it_is(name: str) -> None:
    from html import escape

    told = escape(" ".join(printable(name).split()))
    table = f"| a | b |\n|---|---|\n| {markdown_text(name)} | {markdown_code(name, True)} |"
    html = rendered(table)
    assert re.findall("<td>(.*?)</td>", html, re.DOTALL) == [told, f"<code>{told}</code>"]
    assert rendered(f"Of {markdown_text(name)}.") == f"<p>Of {told}.</p>\n"
    assert rendered(f"Of {markdown_code(name)}.") == f"<p>Of <code>{told}</code>.</p>\n"


def test_a_card_shows_hostile_names_as_they_are(tiny_model: MakeModel, here: Path) -> None:
    name = "m|<img src=x>`*b*`\x1b[2J[l](u)"
    copy_of(tiny_model("llama"), here / name)
    quick = ("--samples", 8, "--seqlen", 64, "--dataset", "demo", "--ratio", 0.6)
    made = ("compress", "--model", name, *quick, "--output", "low")
    succeed(*made, "--set", "compress.evaluate=false")
    update_card(
        here / "low",
        [CardResult(f"{name}<b>", "acc|norm", 0.5, split="*test*", details={"filter": "<i>|x"})],
    )
    text = (here / "low" / "README.md").read_text()
    html = rendered(text.partition("\n---\n")[2])
    assert not FORBIDDEN.search(text)
    assert not re.search("<(img|b|i|a|em)[ >]", html)
    assert "<code>m|&lt;img src=x&gt;`*b*`[2J[l](u)</code>" in html
    rows = [re.findall("<td>(.*?)</td>", row) for row in html.split("<tr>")]
    assert ["acc|norm", "not measured", "0.5", "filter &lt;i&gt;|x"] in [row[1:] for row in rows]
    assert len({len(row) for row in rows if row}) == 2  # of the two tables, none with more cells


# Spreadsheets


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠"])
def test_a_text_is_no_formula(start: str) -> None:
    assert spreadsheet_cell(f"{start}1+1") == f"'{start}1+1"
    assert spreadsheet_cell(f"\x1b\r{start}1") == f"'{start}1"


@pytest.mark.parametrize("value", ["a=b", "", "model-x", "'=1", -1.5, 3, None, float("-inf"), True])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert spreadsheet_cell(value) is value


def test_a_csv_file_holds_no_formula_and_its_numbers_stay(
    tiny_model: MakeModel, here: Path
) -> None:
    name, text = "=cmd|' C'!A0", "@SUM(1).txt"
    copy_of(tiny_model("llama"), here / name)
    (here / text).write_text("in the beginning was a small model " * 40)
    words = ("--dataset", text, "--windows", 2, "--seqlen", 32, "--csv", "t.csv")
    succeed("eval", name, *words, "--markdown", "t.md")
    (row,) = csv.DictReader((here / "t.csv").open(newline=""))
    assert (row["model"], row["dataset"]) == (f"'{name}", f"'{text}")
    assert float(row["perplexity"]) > 1
    assert int(row["windows"]) == 2
    html = rendered((here / "t.md").read_text())
    cells = re.findall("<td.*?>(.*?)</td>", html)
    assert cells[0] == "<code>=cmd|' C'!A0</code>"
    assert len(cells) == 6


def test_the_usage_error_of_a_hostile_flag(here: Path) -> None:
    assert here.is_dir()
    message, _ = fail("eval", "demo", f"--{HOSTILE}", code=2)
    harmless(message)
    assert hisvd("eval", "demo", "--seqlen", HOSTILE).exit_code == 2
